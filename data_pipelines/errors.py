"""The root of every error that users see, and those that data can cause. `clipstack.errors` adds the rest."""


class ClipstackError(Exception):
    """Something the user can act on: the message names the key, the value and the fix."""


class DataError(ClipstackError):
    """Data that cannot be used as asked."""


class ShardError(DataError):
    """A shard that is missing, damaged, or not what its index says."""


class SampleError(DataError):
    """One sample that cannot be used; training quarantines it and goes on."""

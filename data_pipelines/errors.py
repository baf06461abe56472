"""The root of every error that users see, and those that data can cause. `clipstack.errors` adds the rest."""


class ClipstackError(Exception):
    """Something the user can act on: the message names the key, the value and the fix."""


class DataError(ClipstackError):
    """Data that cannot be used as asked."""


class MissingPackageError(ClipstackError):
    """A package that this command needs and the installation lacks."""


class Stopped(ClipstackError):
    """A long command was asked to stop; what is complete stays, and the same command goes on from there."""


class ShardError(DataError):
    """A shard that is missing, damaged, or not what its index says."""


class SampleError(DataError):
    """One sample that cannot be used; training quarantines it and goes on."""

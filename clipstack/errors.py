"""The error tree. Data errors are defined below us, in `data_pipelines`, and shown here as one family."""

from data_pipelines.errors import ClipstackError, DataError, SampleError, ShardError, Stopped

__all__ = [
    "CheckpointError",
    "ClipstackError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "SampleError",
    "ShardError",
    "Stopped",
]


class ConfigError(ClipstackError):
    """A recipe, flag or argument that is wrong."""


class CheckpointError(ClipstackError):
    """A checkpoint or exported model that is damaged, incomplete or does not fit."""


class DivergenceError(ClipstackError):
    """Training diverged more often than the recipe allows."""

"""The error tree, and what errors advise to install. Data errors are defined below us, in `data_pipelines`,
and shown here as one family."""

from data_pipelines.errors import (
    ClipstackError,
    DataError,
    MissingPackageError,
    SampleError,
    ShardError,
    Stopped,
)
from data_pipelines.installing import how_to_install, how_to_reinstall

__all__ = [
    "CheckpointError",
    "ClipstackError",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "MissingPackageError",
    "SampleError",
    "ShardError",
    "Stopped",
    "WorkerError",
    "how_to_install",
    "how_to_reinstall",
]


class ConfigError(ClipstackError):
    """A recipe, flag or argument that is wrong."""


class CheckpointError(ClipstackError):
    """A checkpoint or exported model that is damaged, incomplete or does not fit."""


class WorkerError(ClipstackError):
    """A process of the run's own that died: killed, or out of memory. The data are as they were."""


class DivergenceError(ClipstackError):
    """Training diverged more often than the recipe allows."""

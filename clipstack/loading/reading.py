"""How the `[data]` table of a recipe has shards read."""

from __future__ import annotations

from clipstack.config.models import DataConfig
from data_pipelines.cache import ShardCache
from data_pipelines.rights import EMPTY, load_removal_list
from data_pipelines.stream import ReadOptions


def shard_cache(config: DataConfig, *, drops: bool = False) -> ShardCache:
    """Where remote shards are kept; `drops`: see ShardCache."""
    return ShardCache(config.cache_dir, int(config.cache_size_gb * 1e9), drops=drops)


def read_options(config: DataConfig) -> ReadOptions:
    """Raises DataError for a removal list that cannot be read."""
    return ReadOptions(
        caption=config.caption,
        max_image_pixels=config.max_image_pixels,
        removals=EMPTY if config.removals is None else load_removal_list(config.removals),
        cache_dir=config.cache_dir,
    )

"""The samples of existing shards written as new ones: what `reshard`, `filter` and `dedup` end in."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.building.plan import BuildOptions, plan_jobs
from data_pipelines.building.reports import BuildReport
from data_pipelines.building.run import run_jobs
from data_pipelines.inputs.items import Inputs, Item, ShardImage


def reshard_items(
    inputs: Inputs, out: Path, options: BuildOptions, *, processes: int = 1, label: str = "reshard"
) -> BuildReport:
    """Write the items of existing shards as new ones. Raises what `run.run_jobs` does."""
    sizes = [item_bytes(item) for item in inputs.items] if options.shard_bytes is not None else None
    jobs = plan_jobs(inputs.items, options, sizes=sizes)
    return run_jobs(jobs, out, options, inputs=inputs, processes=processes, label=label)


def item_bytes(item: Item) -> int:
    """What a shard's sample takes in a tar: each member padded to blocks of 512, behind a header of one."""
    assert isinstance(item.image, ShardImage)
    return sum(512 + span.size + -span.size % 512 for _, span in item.image.members)

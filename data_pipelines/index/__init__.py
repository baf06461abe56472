"""The index of a shard, `X.tar.idx`: where each sample's members lie and what their bytes hash to."""

from data_pipelines.index.format import load_index
from data_pipelines.index.indexing import build_index
from data_pipelines.index.writer import Sample, write_shard

__all__ = ["Sample", "build_index", "load_index", "write_shard"]

"""Samples by their place in the order: read by offset, checked against the index, replaced where they
cannot be used."""

from data_pipelines.stream.manifest import make_manifest
from data_pipelines.stream.reader import Reader
from data_pipelines.stream.samples import ReadOptions

__all__ = ["ReadOptions", "Reader", "make_manifest"]

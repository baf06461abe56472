"""Items: where an image and its caption are.

Nothing is read until a worker asks for it, so that items are cheap to hand to another process and a missing
file is a reject with a reason, not the end of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipelines.index.shard_index import Span

DEFAULT_TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}.")
Layout = Literal["auto", "captions", "classes"]


@dataclass(frozen=True, slots=True)
class FileImage:
    """A file of its own."""

    path: str


@dataclass(frozen=True, slots=True)
class Base64Image:
    """A text cell of a table."""

    text: str


@dataclass(frozen=True, slots=True)
class ParquetImage:
    """A binary cell of a Parquet file."""

    path: str
    column: str
    row_group: int
    row: int
    """Inside the row group."""


@dataclass(frozen=True, slots=True)
class ShardImage:
    """A sample of a shard."""

    tar: str
    members: tuple[tuple[str, Span], ...]
    """Extension and place of each member: all that a worker needs, so that it never loads an index."""


ImageRef = FileImage | Base64Image | ParquetImage | ShardImage


@dataclass(frozen=True, slots=True)
class Item:
    """One sample to be."""

    origin: str
    """For people and reports: a file, `table.csv:ROW` or `SHARD/KEY`."""
    image: ImageRef
    captions: tuple[str, ...] = ()
    caption_files: tuple[str, ...] = ()
    """Sidecars to look into, in this order, where there are no `captions`."""
    label: int | None = None
    key: str | None = None
    """Kept from a shard; None: the builder numbers it."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values for `table.CARRIED`; from our own shards also sha256, phash and origin."""


@dataclass(frozen=True)
class Inputs:
    """What was found at the paths of a command line."""

    items: Sequence[Item]
    described: str
    """One line for people: what was found."""
    classnames: tuple[str, ...] = ()
    stamp: str = ""
    """Changes when the inputs do: names and sizes of files."""
    files: tuple[str, ...] = ()
    """Whose times a resumed build compares."""


@dataclass(frozen=True)
class InputOptions:
    """How paths are read, where they leave it open."""

    layout: Layout = "auto"
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    classnames: tuple[str, ...] = ()
    """In the order of the sorted class folders; empty: the folders' own names."""
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str | None = None
    image_root: str | None = None
    """What relative paths in a table start from; None: the table's folder."""
    image_encoding: Literal["path", "base64"] = "path"
    """Of text columns. Binary columns of Parquet are bytes, always."""

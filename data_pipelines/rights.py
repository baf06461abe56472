"""Data rights: where samples come from and under what licence, and the list of those that must no longer be
used.

A removal list is a text file with one entry per line; `#` opens a comment:

    sha256:0f3a...            the image's stored bytes (64 hex digits; 32 or more leading ones will do)
    key:00000.tar/000000012   a shard's file name and a key in it
    url:https://example.org/cat.jpg
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.index.shard_index import DIGEST_BYTES, ShardIndex, image_extension
from data_pipelines.installing import how_to_install

RIGHTS_COLUMNS = ("source", "author", "licence", "url")
ALIASES = {"license": "licence", "LICENSE": "licence", "URL": "url"}
"""Names that other tools give to these columns."""

_HEX = re.compile(r"[0-9a-f]{32,64}")
_PREFIX_CHARS = 2 * DIGEST_BYTES
"""An index keeps this many hex digits of a hash, so entries are compared by so many: 128 bits tell images
apart."""


@dataclass(frozen=True)
class RemovalList:
    """What must not be used. Empty lists match nothing."""

    entries: Mapping[str, str]
    """`sha256:` (first 32 digits), `key:` and `url:` entries in their canonical form to the line as the user
    wrote it."""

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of what the list says, whatever the order of its lines."""
        return hashlib.sha256("\n".join(sorted(self.entries)).encode()).hexdigest()

    @property
    def names_urls(self) -> bool:
        return any(entry.startswith("url:") for entry in self.entries)

    def match(
        self, *, key: str | None = None, sha256: str | None = None, url: str | None = None
    ) -> str | None:
        """The line that asks for the removal of a sample with this `SHARD_FILE_NAME/KEY`, image hash or URL;
        None if none."""
        if key is not None and f"key:{key}" in self.entries:
            return self.entries[f"key:{key}"]
        if sha256 is not None and f"sha256:{sha256[:_PREFIX_CHARS]}" in self.entries:
            return self.entries[f"sha256:{sha256[:_PREFIX_CHARS]}"]
        if url is not None and f"url:{url}" in self.entries:
            return self.entries[f"url:{url}"]
        return None


EMPTY = RemovalList(entries={})


def load_removal_list(path: str | os.PathLike[str]) -> RemovalList:
    """Read a removal list. Raises DataError for a file that cannot be read and for a line that says nothing
    known.

    A line that would be skipped in silence is a sample that stays in use, hence no leniency.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"removal list {os.fspath(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"removal list {os.fspath(path)}: not UTF-8 text") from error
    entries: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if line and not line.startswith("#"):
            entries[_canonical(line, where=f"removal list {os.fspath(path)}, line {number}")] = line
    return RemovalList(entries)


def _canonical(line: str, *, where: str) -> str:
    kind, _, value = line.partition(":")
    match kind:
        case "sha256" if _HEX.fullmatch(value.lower()):
            return f"sha256:{value.lower()[:_PREFIX_CHARS]}"
        case "key" if 0 < value.find("/") < len(value) - 1:
            return line
        case "url" if value:
            return line
        case _:
            raise DataError(
                f"{where}: {line[:80]!r} is none of sha256:HEX (32 digits or more), key:SHARD/KEY, url:URL"
            )


def removed_samples(
    removal: RemovalList, index: ShardIndex, *, shard_name: str, urls: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Positions in a shard that the list removes, each with the line that asks for it.

    `shard_name`: the tar's file name. `urls`: key to URL where known (`shard_urls`).
    """
    if not removal:
        return {}
    out: dict[int, str] = {}
    for position, key in enumerate(index.keys):
        members = index.members(position)
        image = image_extension(members)
        sha256 = None if image is None else members[image].digest.hex()
        url = None if urls is None else urls.get(key)
        line = removal.match(key=f"{shard_name}/{key}", sha256=sha256, url=url)
        if line is not None:
            out[position] = line
    return out


def shard_urls(tar: str | os.PathLike[str]) -> dict[str, str]:
    """Key to URL of a local shard, from the Parquet file beside it; empty where there is none or it has no
    URLs. Raises DataError where it is there and nothing can read it."""
    file = Path(tar).with_suffix(".parquet")
    if not file.exists():
        return {}
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise DataError(
            f"{file}: the removal list names URLs, which stand there, and reading it needs pyarrow; "
            f"{how_to_install('data')}"
        ) from error

    names = pq.read_schema(file).names
    column = next((name for name in ("url", "URL") if name in names), None)
    if column is None or "key" not in names:
        return {}
    table = pq.read_table(file, columns=["key", column])
    return {k: u for k, u in zip(table["key"].to_pylist(), table[column].to_pylist(), strict=True) if k and u}


def rights_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The rights columns of a row or a JSON sidecar, other tools' spellings included; absent and empty ones
    left out."""
    out: dict[str, str] = {}
    for name, value in record.items():
        column = ALIASES.get(name, name)
        if column in RIGHTS_COLUMNS and value not in (None, "") and column not in out:
            out[column] = str(value)
    return out


def rights_of_json(payload: bytes) -> dict[str, str]:
    """The rights columns of a sample's `.json` member; empty if it is no JSON object."""
    try:
        record = json.loads(payload)
    except ValueError:
        return {}
    return rights_of(record) if isinstance(record, dict) else {}

"""What the builder can read: image folders, class trees, tables and existing shards, each as a list of items.

An item says where an image and its caption are; nothing is read until a worker asks for it, so that items are
cheap to hand to another process and a missing file is a reject with a reason, not the end of the run.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, assert_never

from data_pipelines.errors import DataError, SampleError, ShardError
from data_pipelines.index import ShardIndex, Span, build_index, decode_index, payload_digest
from data_pipelines.rights import ALIASES, RIGHTS_COLUMNS, rights_of, rights_of_json
from data_pipelines.sources import LocalFile, did_you_mean, expand, find_index, is_pipe, is_remote
from data_pipelines.table import CARRIED, foreign_columns, image_member, json_captions, read_table

if TYPE_CHECKING:
    import polars as pl

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
)
TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
DEFAULT_TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of a {}.")
CAPTION_NAMES = ("caption", "captions", "text", "TEXT", "title", "alt_text", "description", "sentence")
IMAGE_NAMES = (
    "image",
    "image_path",
    "path",
    "file",
    "filepath",
    "file_name",
    "filename",
    "img",
    "jpg",
    "png",
)

Layout = Literal["auto", "captions", "classes"]


@dataclass(frozen=True, slots=True)
class FileImage:
    path: str


@dataclass(frozen=True, slots=True)
class Base64Image:
    text: str


@dataclass(frozen=True, slots=True)
class ParquetImage:
    path: str
    column: str
    row_group: int
    row: int
    """Inside the row group."""


@dataclass(frozen=True, slots=True)
class ShardImage:
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


def collect(paths: Sequence[str], options: InputOptions) -> Inputs:
    """Everything under `paths`, in their order and by name inside each. Raises DataError for what cannot be
    read at all."""
    parts = [_collect_one(path, options) for path in paths]
    items = [item for part in parts for item in part.items]
    if not items:
        raise DataError(f"{', '.join(paths)}: no images found")
    classnames = {part.classnames for part in parts if part.classnames}
    if len(classnames) > 1:
        raise DataError(
            "the class folders of the inputs differ, so their labels would not agree; build them one by one"
        )
    return Inputs(
        items=items,
        described="; ".join(part.described for part in parts),
        classnames=next(iter(classnames), ()),
        stamp=hashlib.sha256("\n".join(part.stamp for part in parts).encode()).hexdigest(),
        files=tuple(file for part in parts for file in part.files),
    )


def _collect_one(text: str, options: InputOptions) -> Inputs:
    path = Path(text)
    if path.is_dir():
        return _collect_folder(path, options)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return _collect_table(path, options)
    if path.suffix == ".tar" or "{" in text:
        return shard_items(expand_shards([text]))
    if not path.exists():
        raise DataError(f"{text}: no such file or folder{did_you_mean(path)}")
    raise DataError(f"{text}: not a folder, a shard (.tar) or a table ({', '.join(TABLE_SUFFIXES)})")


# ---- folders -----------------------------------------------------------------------------------------------


def _files_below(folder: Path) -> Iterator[tuple[str, int]]:
    """(path relative to `folder` with forward slashes, size in bytes), in the order of the paths; hidden ones
    left out."""
    stack: list[str] = [""]
    while stack:
        below = stack.pop()
        with os.scandir(folder / below) as entries:
            found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        yield from ((below + e.name, e.stat().st_size) for e in found if not e.is_dir())
        stack.extend(below + e.name + "/" for e in reversed(found) if e.is_dir())


def _collect_folder(folder: Path, options: InputOptions) -> Inputs:
    files = dict(_files_below(folder))
    if any(name.endswith(".tar") for name in files):
        return shard_items([folder / name for name in files if name.endswith(".tar")])
    images = [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    sidecars = {image: _sidecars(image, files) for image in images}
    layout = options.layout
    if layout == "auto":
        layout = (
            "captions" if any(sidecars.values()) or not any("/" in name for name in images) else "classes"
        )
    stamp = "\n".join(f"{name}\t{size}" for name, size in files.items())
    paths = tuple(str(folder / name) for name in files)
    match layout:
        case "captions":
            if images and not any(sidecars.values()):
                raise DataError(
                    f"{folder}: {len(images)} images, but no captions; put NAME.txt beside NAME.jpg, "
                    "or build from a table of paths and captions"
                )
            items = [
                Item(
                    origin=image,
                    image=FileImage(str(folder / image)),
                    caption_files=tuple(str(folder / name) for name in sidecars[image]),
                )
                for image in images
            ]
            described = (
                f"{folder}: {len(items)} images, {sum(map(bool, sidecars.values()))} with a sidecar caption"
            )
            return Inputs(items, described, stamp=stamp, files=paths)
        case "classes":
            items, names = _class_items(folder, images, options)
            return Inputs(
                items, f"{folder}: {len(items)} images in {len(names)} classes", names, stamp, paths
            )
        case _:
            assert_never(layout)


def _sidecars(image: str, files: Mapping[str, int]) -> list[str]:
    stem = image[: -len(Path(image).suffix)]
    return [stem + suffix for suffix in (".txt", ".caption", ".json") if stem + suffix in files]


def _class_items(
    folder: Path, images: Sequence[str], options: InputOptions
) -> tuple[list[Item], tuple[str, ...]]:
    """Labels count the sorted folder names, as torchvision's ImageFolder does."""
    images = [image for image in images if "/" in image]
    folders = sorted({image.split("/", 1)[0] for image in images})
    names = options.classnames or tuple(name.replace("_", " ") for name in folders)
    if len(names) != len(folders):
        raise DataError(f"{folder}: {len(folders)} class folders, but {len(names)} class names")
    label = {name: i for i, name in enumerate(folders)}
    items = []
    for image in images:
        number = label[image.split("/", 1)[0]]
        items.append(
            Item(
                origin=image,
                image=FileImage(str(folder / image)),
                captions=(fill_template(pick_template(options.templates, image), names[number]),),
                label=number,
            )
        )
    return items, names


def pick_template(templates: Sequence[str], name: str) -> str:
    """One template by a hash of the image's name: spread evenly, and the same whatever else is in the
    folder."""
    return templates[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % len(templates)]


def fill_template(template: str, classname: str) -> str:
    return template.replace("{c}", classname).replace("{}", classname)


def read_templates(path: str) -> tuple[str, ...]:
    """Lines of a file, each with `{}` or `{c}` where the class name goes. Raises DataError."""
    lines = read_lines(path)
    for line in lines:
        if "{}" not in line and "{c}" not in line:
            raise DataError(f"templates {path}: {line!r} has no {{}} where the class name goes")
    return lines


def read_lines(path: str) -> tuple[str, ...]:
    """The lines of a text file that say something. Raises DataError."""
    try:
        lines = tuple(
            line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()
        )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if not lines:
        raise DataError(f"{path}: empty")
    return lines


# ---- tables ------------------------------------------------------------------------------------------------


def _collect_table(path: Path, options: InputOptions) -> Inputs:
    schema = _table_schema(path)
    image = _pick(path, schema, options.image_column, IMAGE_NAMES, "--image-column")
    caption = _pick(path, schema, options.caption_column, CAPTION_NAMES, "--caption-column")
    label = _pick(path, schema, options.label_column, (), "--label-column") if options.label_column else None
    carried = {c: ALIASES.get(c, c) for c in schema if ALIASES.get(c, c) in (*RIGHTS_COLUMNS, "language")}
    wanted = list(
        dict.fromkeys(
            (*([] if _is_bytes(schema[image]) else [image]), caption, *([label] if label else []), *carried)
        )
    )
    rows = _table_rows(path, wanted)
    reference = _image_references(path, image, schema[image], options)
    items = [
        Item(
            origin=f"{path.name}:{number}",
            image=reference(number, row),
            captions=_captions_of(row[caption]),
            label=None if label is None else _label_value(row[label], f"{path}, row {number}"),
            columns={name: str(row[c]) for c, name in carried.items() if row[c] not in (None, "")},
        )
        for number, row in enumerate(rows.iter_rows(named=True))
    ]
    stamp = f"{path.name}\t{path.stat().st_size}"
    return Inputs(
        items,
        f"{path}: {len(items)} rows, images in {image!r}, captions in {caption!r}",
        stamp=stamp,
        files=(str(path),),
    )


def _table_schema(path: Path) -> dict[str, pl.DataType]:
    import polars as pl

    try:
        return dict(_scan(path).collect_schema())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error


def _scan(path: Path) -> pl.LazyFrame:
    import polars as pl

    # Text tables are read as text: a caption such as "1984" or an author "007" must not turn into a number.
    match path.suffix.lower():
        case ".csv":
            return pl.scan_csv(path, infer_schema=False)
        case ".tsv":
            return pl.scan_csv(path, separator="\t", infer_schema=False)
        case ".parquet":
            return pl.scan_parquet(path)
        case ".json":
            return _json_rows(path).lazy()
        case _:
            return pl.scan_ndjson(path, infer_schema_length=None)


def _json_rows(path: Path) -> pl.DataFrame:
    """A list of objects, one for each row. Raises DataError for JSON of another form."""
    import polars as pl

    text = path.read_bytes()
    if not text.lstrip().startswith(b"["):
        raise DataError(
            f'{path}: not a list; a .json table is [{{"image": "a.jpg", "caption": "..."}}, ...], '
            "and one object a line belongs into a .jsonl file"
        )
    return pl.read_json(text, infer_schema_length=None)


def _table_rows(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    import polars as pl

    try:
        return _scan(path).select(columns).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from error


def _pick(
    path: Path, schema: Mapping[str, pl.DataType], asked: str | None, usual: Sequence[str], option: str
) -> str:
    if asked is not None:
        if asked in schema:
            return asked
        near = difflib.get_close_matches(asked, schema, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{path}: {option} {asked!r} is not among its columns {', '.join(schema)}{hint}")
    for name in usual:
        if name in schema:
            return name
    columns, hint = ", ".join(schema), _separator_hint(schema)
    raise DataError(f"{path}: which of its columns {columns} is meant? Say {option} NAME{hint}")


def _separator_hint(schema: Mapping[str, pl.DataType]) -> str:
    """For a table of one column whose name is a whole line of another format."""
    (name, *others) = schema
    if others or not (";" in name or "\t" in name):
        return ""
    return "; commas separate the columns of a .csv, tabs those of a .tsv, this file seems to have neither"


def _is_bytes(dtype: pl.DataType) -> bool:
    """Binary, or the struct of bytes and path that Hugging Face's datasets write."""
    import polars as pl

    return dtype == pl.Binary or (
        isinstance(dtype, pl.Struct) and any(f.name == "bytes" for f in dtype.fields)
    )


def _image_references(
    path: Path, column: str, dtype: pl.DataType, options: InputOptions
) -> Callable[[int, Mapping[str, Any]], ImageRef]:
    if _is_bytes(dtype):
        groups = _row_groups(path)

        def cell(number: int, row: Mapping[str, Any]) -> ImageRef:
            return ParquetImage(str(path), column, *groups(number))

        return cell
    if options.image_encoding == "base64":
        return lambda number, row: Base64Image(str(row[column] or ""))
    root = Path(options.image_root) if options.image_root is not None else path.parent
    return lambda number, row: FileImage(str(root / str(row[column] or "")))


def _row_groups(path: Path) -> Callable[[int], tuple[int, int]]:
    """Row number to (row group, row inside it)."""
    import bisect

    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(path).metadata
    starts = [0]
    for i in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(i).num_rows)

    def locate(number: int) -> tuple[int, int]:
        group = bisect.bisect_right(starts, number) - 1
        return group, number - starts[group]

    return locate


def _captions_of(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(str(v).strip() for v in values if v is not None and str(v).strip())


def _label_value(value: Any, where: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        return int(value)
    except ValueError as error:
        raise DataError(f"{where}: label {value!r} is not a whole number") from error


# ---- shards ------------------------------------------------------------------------------------------------


def expand_shards(patterns: Sequence[str]) -> list[Path]:
    """Local tars of paths, folders and brace patterns like `{00000..00009}.tar`. Raises DataError."""
    out: list[str] = []
    for pattern in patterns:
        if is_pipe(pattern) or is_remote(pattern):
            raise DataError(f"{pattern}: this command reads local shards; copy them here first")
        folder = Path(pattern)
        if folder.is_dir() and not any(path.suffix == ".tar" for path in folder.iterdir()):
            # Split folders, as CLIP_benchmark keeps them, stand one level below.
            below = sorted(str(path) for path in folder.glob("*/*.tar") if not path.name.startswith("."))
            out.extend(below or expand(pattern))
        elif "{" not in pattern and "*" not in pattern and not folder.exists():
            raise DataError(f"{pattern}: no such shard or folder{did_you_mean(folder)}")
        else:
            out.extend(expand(pattern))
    missing = [path for path in out if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{missing[0]}: no such shard")
    return [Path(path) for path in out]


def shard_index(tar: Path) -> ShardIndex:
    """The index of a tar, or one made now, in memory, where there is none. Raises ShardError for a damaged
    shard."""
    found = find_index(str(tar))
    index = build_index(tar) if found is None else decode_index(found[1], name=found[0])
    size = tar.stat().st_size
    if index.damage or size != index.tar_size:
        reason = index.damage[0].reason if index.damage else f"{size} bytes, by its index {index.tar_size}"
        raise ShardError(
            f"{tar}: damaged: {reason}; `clipstack data verify --repair` saves what can be saved"
        )
    return index


def shard_items(tars: Sequence[Path]) -> Inputs:
    """The samples of existing shards. Their tables' columns are carried on. Raises ShardError for a damaged
    one."""
    items: list[Item] = []
    stamp: list[str] = []
    for tar in tars:
        index = shard_index(tar)
        carried = shard_columns(tar)
        stamp.append(f"{tar.name}\t{index.digest}")
        items.extend(
            Item(
                origin=f"{tar.name}/{key}",
                image=ShardImage(str(tar), tuple(index.members(position).items())),
                key=key,
                columns=carried.get(key, {}),
            )
            for position, key in enumerate(index.keys)
        )
    described = f"{len(tars)} shards with {len(items)} samples"
    return Inputs(items, described, stamp="\n".join(stamp), files=tuple(map(str, tars)))


def shard_columns(tar: Path) -> dict[str, dict[str, Any]]:
    """Key to the carried columns of a shard, from its own table or another tool's."""
    frame = read_table(tar)
    if frame is None:
        return foreign_columns(tar)
    rows = frame.select("key", *CARRIED, "sha256", "phash", "origin").iter_rows(named=True)
    return {
        row["key"]: {name: value for name, value in row.items() if name != "key" and value is not None}
        for row in rows
    }


def read_members(image: ShardImage) -> dict[str, bytes]:
    """Extension to payload, each checked against its hash. Raises SampleError where the bytes have
    changed."""
    file = _open_shard(image.tar)
    out: dict[str, bytes] = {}
    for extension, span in image.members:
        payload = file.read(span.offset, span.offset + span.size)
        if payload_digest(payload) != span.digest:
            raise SampleError(f"the bytes of .{extension} are not those that the index knows")
        out[extension] = payload
    return out


@lru_cache(maxsize=64)
def _open_shard(tar: str) -> LocalFile:
    return LocalFile(tar)


# ---- reading one item --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawSample:
    """What an item holds: the image's bytes as they came, its captions, and other members to carry on."""

    image: bytes
    captions: tuple[str, ...]
    columns: Mapping[str, Any]
    members: Mapping[str, bytes] = field(default_factory=dict)
    """All members, for items from shards."""


def read_item(item: Item) -> RawSample:
    """Raises SampleError with the reason where the item cannot be used."""
    match item.image:
        case ShardImage():
            members = read_members(item.image)
            extension = image_member(members)
            if extension is None:
                raise SampleError("no image")
            columns = {**rights_of_json(members.get("json", b"")), **item.columns}
            return RawSample(members[extension], (), columns, members)
        case FileImage(path):
            image = _read_file(path)
        case Base64Image(text):
            try:
                image = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise SampleError("the image is not base64") from error
        case ParquetImage(path, column, row_group, row):
            image = _parquet_cell(path, column, row_group, row)
        case _:
            assert_never(item.image)
    captions, rights = (item.captions, {}) if item.captions else _sidecar(item.caption_files)
    if not captions:
        raise SampleError("no caption")
    return RawSample(image, captions, {**item.columns, **rights})


def _sidecar(files: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """(captions, rights) of the sidecars: the captions of the first that has any, the rights of a .json."""
    captions: tuple[str, ...] = ()
    rights: dict[str, str] = {}
    for file in files:
        payload = _read_file(file)
        if file.endswith(".json"):
            captions = captions or json_captions(payload)
            try:
                record = json.loads(payload)
            except ValueError as error:
                raise SampleError(f"{Path(file).name} is not JSON") from error
            rights = rights_of(record) if isinstance(record, dict) else {}
        elif not captions:
            try:
                text = payload.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise SampleError(f"{Path(file).name} is not UTF-8 text") from error
            captions = (text,) if text else ()
    return captions, rights


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleError(f"{path} cannot be read: {reason}") from error


def _parquet_cell(path: str, column: str, row_group: int, row: int) -> bytes:
    value = _parquet_column(path, column, row_group)[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise SampleError("no image bytes")
    return bytes(data)


@lru_cache(maxsize=2)
def _parquet_column(path: str, column: str, row_group: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(row_group, columns=[column])[column]

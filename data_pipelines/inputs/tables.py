"""Tables (CSV, TSV, JSON, Parquet) to items: paths, base64 or bytes of images, and captions."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.items import (
    Base64Image,
    FileImage,
    ImageRef,
    InputOptions,
    Inputs,
    Item,
    ParquetImage,
)
from data_pipelines.rights import ALIASES, RIGHTS_COLUMNS

if TYPE_CHECKING:
    import polars as pl


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


def collect_table(path: Path, options: InputOptions) -> Inputs:
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

"""What evaluations read: shards in any layout, CLIP_benchmark's folders, and ImageFolder trees."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipstack.config.models import DataConfig
from clipstack.errors import ConfigError, DataError, SampleError, ShardError
from clipstack.loading.eval_loader import EvalSamples, ShardSamples
from clipstack.templates import check_template, read_lines
from data_pipelines.images import MAX_IMAGE_PIXELS
from data_pipelines.index.finding import ensure_summary
from data_pipelines.index.shard_index import IMAGE_EXTENSIONS
from data_pipelines.sources import expand, is_remote, shard_name
from data_pipelines.stream.quarantine import BadSample
from data_pipelines.stream.samples import RawSample

CLASSNAMES_FILE, TEMPLATES_FILE = "classnames.txt", "zeroshot_classification_templates.txt"
NUM_SHARDS_FILE = "nshards.txt"
SPLITS = ("train", "val", "test")
Captions = Literal["required", "optional", "ignored"]


@dataclass(frozen=True)
class EvalData:
    """Samples, and what lies beside them."""

    path: str
    samples: EvalSamples
    digest: str
    """Equal for equal contents, wherever they lie."""
    classnames: tuple[str, ...] | None
    templates: tuple[str, ...] | None
    """The data set's own prompt templates."""
    num_shards: int
    empty_shards: tuple[str, ...]
    """Shards without a sample."""
    bad_shards: tuple[BadSample, ...]
    """Shards that cannot be read at all."""
    folders: tuple[str, ...] | None = None
    """Of a tree: the folder of each class, which is what its labels count."""


def open_eval_data(
    path: str, *, captions: Captions, split: str = "test", classnames: Path | None = None
) -> EvalData:
    """Shards (file, folder, brace pattern, glob, URL), a folder in CLIP_benchmark's layout, or an ImageFolder
    tree. Raises ConfigError, DataError.

    split: the folder below a CLIP_benchmark root. classnames: a file that takes the place of what lies
    beside.
    """
    root = Path(path)
    if root.is_dir() and not any(root.glob("*.tar")):
        if any((root / split).glob("*.tar")):
            return _open_benchmark(root, split, captions=captions, classnames=classnames)
        other = next((child for child in sorted(root.iterdir()) if any(child.glob("*.tar"))), None)
        if other is not None:
            raise ConfigError(
                f"--split {split}: no shards there; {other} has some: give --split {other.name}, "
                f"or name {other} itself as the data"
            )
        if captions == "required":
            raise ConfigError(f"--data {path}: no shards (*.tar) there; retrieval needs shards with captions")
        return _open_tree(root, classnames=classnames)
    return _open_shards(path, captions=captions, beside=folders_beside(path), classnames=classnames)


def _open_benchmark(root: Path, split: str, *, captions: Captions, classnames: Path | None) -> EvalData:
    folder = root / split
    told = folder / NUM_SHARDS_FILE
    if told.is_file():
        _check_num_shards(told, folder)
    return _open_shards(
        str(folder), captions=captions, beside=[root, folder], classnames=classnames, name=str(root)
    )


def _check_num_shards(told: Path, folder: Path) -> None:
    (text,) = read_lines(told, key="--data")[:1] or ("",)
    if not text.isdecimal():
        raise DataError(f"{told}: holds {text!r}; it must hold the number of shards")
    missing = [f"{k}.tar" for k in range(int(text)) if not (folder / f"{k}.tar").is_file()]
    if missing:
        raise DataError(
            f"{told}: says {text} shards; {len(missing)} are missing, such as {missing[0]}: fetch them again"
        )


def _open_shards(
    path: str, *, captions: Captions, beside: Sequence[Path], classnames: Path | None, name: str | None = None
) -> EvalData:
    shards, empty, bad = _sort_shards(expand(path))
    if not shards:
        raise DataError(
            f"--data {path}: none of its {len(empty) + len(bad)} shards holds a sample; {_why(empty, bad)}"
        )
    samples = ShardSamples(shards, DataConfig(train=path, max_bad_fraction=1.0), captions=captions)
    return EvalData(
        path=name or path,
        samples=samples,
        digest=samples.manifest.digest,
        classnames=find_classnames(classnames, beside, key="--classnames"),
        templates=_templates(beside),
        num_shards=len(shards) + len(empty) + len(bad),
        empty_shards=empty,
        bad_shards=bad,
    )


def _sort_shards(urls: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[BadSample, ...]]:
    """(those with samples, names of empty ones, those that cannot be read)."""
    full, empty, bad = [], [], []
    for url in sorted(urls, key=by_number):
        try:
            summary = ensure_summary(url)
        except ShardError as error:
            bad.append(BadSample(shard_name(url), None, str(error)))
            continue
        if summary.num_samples:
            full.append(url)
        else:
            empty.append(shard_name(url))
    return tuple(full), tuple(empty), tuple(bad)


def by_number(url: str) -> tuple[str, int, str]:
    """10.tar after 9.tar, as CLIP_benchmark counts its shards; all other names by their letters."""
    folder, _, name = url.rpartition("/")
    stem = name.partition(".")[0]
    return (folder, int(stem), "") if stem.isdecimal() else (folder, -1, name)


def _why(empty: Sequence[str], bad: Sequence[BadSample]) -> str:
    return bad[0].reason if bad else f"{empty[0]} is an empty archive"


def folders_beside(path: str) -> list[Path]:
    """Local folders in which the data's own files may lie."""
    if is_remote(path):
        return []
    where = Path(path)
    folder = where if where.is_dir() else where.parent
    return [folder, folder.parent] if folder.name in SPLITS else [folder]


def find_classnames(given: Path | None, beside: Sequence[Path], *, key: str) -> tuple[str, ...] | None:
    """The names in a file that was given under `key`, or of classnames.txt in one of the folders. Raises
    ConfigError."""
    if given is not None:
        return _names_in(given, key=key)
    files = [folder / CLASSNAMES_FILE for folder in beside]
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else _names_in(found, key="classes of")


def _names_in(file: Path, *, key: str) -> tuple[str, ...]:
    names = read_lines(file, key=key)
    for number, name in enumerate(names, 1):
        if not name:
            raise ConfigError(
                f"{key} {file}: line {number} is empty; line k names class k-1, so none may be left out"
            )
    if not names:
        raise ConfigError(f"{key} {file}: holds no class names; write one a line")
    return names


def _templates(beside: Sequence[Path]) -> tuple[str, ...] | None:
    found = next((folder / TEMPLATES_FILE for folder in beside if (folder / TEMPLATES_FILE).is_file()), None)
    if found is None:
        return None
    templates = tuple(line for line in read_lines(found, key="--data") if line)
    for number, template in enumerate(templates, 1):
        problem = check_template(template)
        if problem is not None:
            raise ConfigError(
                f"--data {found}: line {number} {template!r} {problem}; give --templates to do without"
            )
    return templates or None


class TreeSamples:
    """An ImageFolder tree: one folder a class, classes and files in the order of their names.

    As for `clipstack data build`, a folder without images and one whose name starts with a dot is no class.
    """

    damage: tuple[BadSample, ...] = ()
    max_image_pixels = MAX_IMAGE_PIXELS

    def __init__(self, root: Path) -> None:
        """Raises DataError for a folder without images."""
        self._root = root
        images = {
            child.name: _images_in(child)
            for child in sorted(root.iterdir())
            if child.is_dir() and not child.name.startswith(".")
        }
        self.classes = tuple(name for name, files in images.items() if files)
        self.files = [
            (file.relative_to(root).as_posix(), label)
            for label, name in enumerate(self.classes)
            for file in images[name]
        ]
        if not self.files:
            raise DataError(
                f"--data {root}: neither shards (*.tar) nor a tree CLASS/IMAGE with images "
                f"({', '.join(IMAGE_EXTENSIONS)})"
            )

    @property
    def num_samples(self) -> int:
        return len(self.files)

    def read(self, sample: int) -> RawSample:
        name, label = self.files[sample]
        try:
            data = (self._root / name).read_bytes()
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from error
        return RawSample(name, data, hashlib.sha256(data).digest(), (), label)

    def place(self, sample: int) -> tuple[str, str]:
        return self._root.name, self.files[sample][0]


def _images_in(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]


def _open_tree(root: Path, *, classnames: Path | None) -> EvalData:
    samples = TreeSamples(root)
    listed = [(name, (root / name).stat().st_size) for name, _ in samples.files]
    own = find_classnames(classnames, [root], key="--classnames")
    if own is not None and len(own) != len(samples.classes):
        raise ConfigError(
            f"--classnames: {len(own)} names for the {len(samples.classes)} folders of {root}; "
            "give one a folder, in the order of the folders' names"
        )
    return EvalData(
        path=str(root),
        samples=samples,
        digest=hashlib.sha256(repr(listed).encode()).hexdigest(),
        classnames=own or tuple(name.replace("_", " ") for name in samples.classes),
        templates=_templates([root]),
        num_shards=0,
        empty_shards=(),
        bad_shards=(),
        folders=samples.classes,
    )

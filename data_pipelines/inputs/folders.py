"""Image folders to items: captions in files beside the images, or class folders and caption templates."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import assert_never

from data_pipelines.errors import DataError
from data_pipelines.inputs.items import FileImage, InputOptions, Inputs, Item
from data_pipelines.inputs.shards import shard_items

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
)


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


def collect_folder(folder: Path, options: InputOptions) -> Inputs:
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

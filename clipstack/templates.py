"""Prompt templates: named sets, a user's file, and how a class name goes into one."""

from __future__ import annotations

from pathlib import Path

from clipstack.errors import ConfigError

PLACEHOLDERS = ("{}", "{c}")

SINGLE = ("a photo of a {}.",)

SIMPLE = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a blurry photo of a {}.",
    "a picture showing a {}.",
)

_DETERMINERS = ("a", "the", "my")
_KINDS = (
    "a photo of {} {{}}.",
    "a good photo of {} {{}}.",
    "a bad photo of {} {{}}.",
    "a large photo of {} {{}}.",
    "a small photo of {} {{}}.",
    "a dark photo of {} {{}}.",
    "a bright photo of {} {{}}.",
    "a blurry photo of {} {{}}.",
    "a sharp photo of {} {{}}.",
    "a close-up of {} {{}}.",
    "a cropped photo of {} {{}}.",
    "a black and white photo of {} {{}}.",
    "a photo of {} {{}} seen from afar.",
    "a snapshot of {} {{}}.",
    "a drawing of {} {{}}.",
    "a painting of {} {{}}.",
    "a sculpture of {} {{}}.",
    "a toy version of {} {{}}.",
    "a rendering of {} {{}}.",
    "an origami figure of {} {{}}.",
)
_PLURALS = (
    "a photo of many {}.",
    "art of the {}.",
    "graffiti of a {}.",
    "a {} in a video game.",
    "itap of a {}.",
)

ENSEMBLE = (*(kind.format(word) for kind in _KINDS for word in _DETERMINERS), *_PLURALS)

NAMES = ("single", "simple", "ensemble", "openai")
"""`openai` is the list of 80 that CLIP was published with, as the installed open_clip keeps it."""


def load_templates(name_or_file: str) -> tuple[str, ...]:
    """A named set, or a UTF-8 file with one template a line, `{}` or `{c}` in each. Raises ConfigError."""
    return named_templates(name_or_file) or _of_file(Path(name_or_file))


def named_templates(name: str) -> tuple[str, ...] | None:
    """One of NAMES; None for any other name. Never looks at files."""
    match name:
        case "single":
            return SINGLE
        case "simple":
            return SIMPLE
        case "ensemble":
            return ENSEMBLE
        case "openai":
            return _of_open_clip()
        case _:
            return None


def fill(template: str, classname: str) -> str:
    """The template with the class name in place of its first placeholder; no format string is evaluated."""
    mark = next(mark for mark in PLACEHOLDERS if mark in template)
    before, after = template.split(mark, 1)
    return before + classname + after


def check_template(template: str) -> str | None:
    """What is wrong with a template, or None."""
    count = sum(template.count(mark) for mark in PLACEHOLDERS)
    return None if count == 1 else f"has {count} placeholders; write {{}} or {{c}} once"


def read_lines(path: Path, *, key: str) -> tuple[str, ...]:
    """The lines of a small UTF-8 file without their ends, empty ones at the end dropped. Raises
    ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key} {path}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{key} {path}: cannot be read ({error.strerror}); name a text file with one entry a line"
        ) from error
    return tuple(line.strip() for line in text.rstrip().splitlines())


def _of_file(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise ConfigError(f"--templates {path}: no such file and no named set; sets: {', '.join(NAMES)}")
    templates = tuple(line for line in read_lines(path, key="--templates") if line)
    if not templates:
        raise ConfigError(
            f"--templates {path}: holds no template; write one a line, such as a photo of a {{}}."
        )
    for number, template in enumerate(templates, 1):
        problem = check_template(template)
        if problem is not None:
            raise ConfigError(f"--templates {path}: line {number} {template!r} {problem}")
    return templates


def _of_open_clip() -> tuple[str, ...]:
    import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
    from open_clip import zero_shot_metadata

    return tuple(function("{}") for function in zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES)

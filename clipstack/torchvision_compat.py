"""Lets a CUDA build of torchvision be imported beside a CPU-only torch. Import this before open_clip, timm or
torchvision.

The registry's torchvision wheel is a CUDA build whose compiled operators cannot load without CUDA's
libraries. Its import then fails on two operators that nothing here calls; declaring them is enough. Where
they load, nothing is done.
"""

import importlib.util
from pathlib import Path

import torch

_SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # no torchvision: its own import error is the clearest message
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True


def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for signature in _SIGNATURES:
        library.define(signature)  # type: ignore[no-untyped-call]
    return library


_is_cpu_build = torch.version.cuda is None and torch.version.hip is None
# Held for the life of the process: a library's operators vanish with it.
_DECLARED = None if not _is_cpu_build or _compiled_operators_load() else _declare_operators()

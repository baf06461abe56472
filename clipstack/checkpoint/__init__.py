"""Training state on disk, exported models, and reading any model back.

A checkpoint says nothing of ranks or ZeRO stages: whole weights, whole optimizer state by parameter name. Its
folder is also a folder that open_clip loads. No pickle anywhere.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipstack.checkpoint.export import export_model
    from clipstack.checkpoint.finding import has_model
    from clipstack.checkpoint.load import LoadedModel, load_model

__all__ = ["LoadedModel", "export_model", "has_model", "load_model"]

_MODULES = {
    "export_model": "export",
    "has_model": "finding",
    "LoadedModel": "load",
    "load_model": "load",
}


def __getattr__(name: str) -> Any:
    """Imported when they are asked for: who lists runs need not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

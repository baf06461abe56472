"""Training state on disk, exported models, and reading any model back.

A checkpoint says nothing of ranks or ZeRO stages: whole weights, whole optimizer state by parameter name. Its
folder is also a folder that open_clip loads. No pickle anywhere.
"""

from clipstack.checkpoint.export import export_model
from clipstack.checkpoint.load import LoadedModel, load_model

__all__ = ["LoadedModel", "export_model", "load_model"]

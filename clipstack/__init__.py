"""clipstack: pretrain, evaluate and export CLIP-style models. Importing it stays light: no torch until
asked."""

__version__ = "0.1.0"

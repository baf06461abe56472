"""Recipes: every table of them as a frozen model; read, written, and explained. Imports no torch."""

from clipstack.config.models import Recipe
from clipstack.config.reading import load_recipe, parse_recipe
from clipstack.config.writing import to_toml

__all__ = ["Recipe", "load_recipe", "parse_recipe", "to_toml"]

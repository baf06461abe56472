"""Shards: build, index, order, stream, check. Imports nothing of clipstack and, outside `shapes`, no
torch."""

"""Shards: build, index, order, stream, check. Imports nothing of clipstack and no torch."""

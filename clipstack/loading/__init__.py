"""Shards to batches: for training by position in the order, for evaluation in one ordered pass."""

"""Evaluation: the data, the four tasks, and the report that they end in."""

"""Training: the loop, the engine under it, and what a run folder keeps."""

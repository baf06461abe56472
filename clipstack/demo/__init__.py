"""`clipstack demo`: from nothing to a trained, examined model on a laptop CPU."""

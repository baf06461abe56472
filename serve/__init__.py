"""serve: the REST API for zero-shot classification and embeddings."""

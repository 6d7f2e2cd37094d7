"""The engine: what training, alignment, generation and serving share."""

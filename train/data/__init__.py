"""From text to batches: sources, the built-in stories, shards and the loader."""

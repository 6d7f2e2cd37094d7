"""From text to batches: sources, the built-in stories, token files and loaders. README.md here is the map."""

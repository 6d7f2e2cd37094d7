"""The `gpt` command: parse, call, print."""

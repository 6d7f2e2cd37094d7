"""`python3 -m cli` runs `gpt` from the tree, where it is not installed."""

import sys
from pathlib import Path

# Python puts the working directory first, where a train.py may be somebody else's.
if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
    del sys.path[0]

from cli.main import main

main()

"""`python3 -m cli` is `gpt`, straight from the tree."""

from cli.main import main

main()

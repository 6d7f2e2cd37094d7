#!/usr/bin/env bash
# One would guess: load_dataset on a folder with stories.jsonl and validation.jsonl trains on the first and holds out the
# second; and a file called eval.jsonl is a validation split.
# True: as soon as one file is named after a split, files that are named after none are left out, without a word: there
# is a validation split and no other. And eval and evaluation mean test.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0
cd "$folder"
mkdir corpus named
for n in 1 2 3 4 5; do echo "{\"text\": \"story $n\"}"; done > corpus/stories.jsonl
echo '{"text": "held out"}' > corpus/validation.jsonl
cp corpus/stories.jsonl named/train.jsonl
cp corpus/validation.jsonl named/eval.jsonl
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import datasets

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
found = {}
for folder in ("corpus", "named"):
    splits = datasets.load_dataset(folder, cache_dir="cache")
    found[folder] = {name: rows.num_rows for name, rows in splits.items()}
    print(folder, found[folder])
assert found["corpus"] == {"validation": 1}, "stories.jsonl is loaded now"
assert found["named"] == {"train": 5, "test": 1}, "eval is no longer test"
PYTHON

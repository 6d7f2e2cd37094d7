#!/usr/bin/env bash
# One would guess: a chat whose turns hold text in one row and a list of parts in another cannot be one Parquet column;
# or that, once datasets has written it, any reader of Parquet gives the texts back as they were.
# True: datasets 5 stores what has no one type as Arrow's arrow.json. Read by pyarrow alone every value is JSON text, also
# one that was a plain text: it comes with quotation marks, and a chat template would put them into the conversation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
cat > chat.jsonl <<'ROWS'
{"messages": [{"role": "user", "content": "hi"}]}
{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
ROWS
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import datasets
import pyarrow
from pyarrow import parquet

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
rows = datasets.load_dataset("json", data_files="chat.jsonl", split="train", cache_dir="cache")
rows.to_parquet("chat.parquet")
table = parquet.read_table("chat.parquet")
print(table.schema.field("messages").type)
read = [row["messages"][0]["content"] for row in table.to_pylist()]
print("pyarrow gives", read, "and datasets", rows[0]["messages"][0]["content"])
assert read == ['"hi"', '[{"type":"text","text":"hi"}]'], "pyarrow gives other values now"
assert rows[0]["messages"][0]["content"] == "hi"
PYTHON

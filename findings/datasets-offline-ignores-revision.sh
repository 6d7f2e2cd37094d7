#!/usr/bin/env bash
# One would guess: with HF_HUB_OFFLINE=1, load_dataset(name, revision=COMMIT) returns that commit if it was downloaded, and
# refuses otherwise.
# True: the revision is ignored. What comes is whichever commit was downloaded last, for any revision at all, even one that
# never was, and where the right one lies beside it in the cache. The one trace is the hash of the builder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 huggingface_hub==2.4.0
cd "$folder"
# A hub on this machine, with one data set: the newest of two commits is its main branch.
cat > hub.py <<'PYTHON'
import json, re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMITS = {"a" * 40: "old", "b" * 40: "new"}

class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        asked = re.match(r"/(?:api/)?datasets/me/set(?:/(\w+)/(\w+)/?([^?]*))?", self.path)
        what, revision, path = asked.groups() if asked else ("resolve", "", "")
        commit = revision if revision in COMMITS else "a" * 40
        file = json.dumps({"text": COMMITS[commit]}).encode()
        entry = {"type": "file", "path": "train.jsonl", "size": len(file), "oid": commit}
        headers, status, body = {"X-Repo-Commit": commit, "ETag": commit}, 200, file
        if what == "tree":
            body = json.dumps([] if path else [entry]).encode()
        elif what != "resolve":
            body = json.dumps({"id": "me/set", "sha": commit, "siblings": [{"rfilename": "train.jsonl"}]}).encode()
        elif path != "train.jsonl":
            headers["X-Error-Code"], status, body = "EntryNotFound", 404, b""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
PYTHON
python3 hub.py > port &
trap 'kill %1; rm -rf "$folder"' EXIT
until [ -s port ]; do sleep 0.1; done
export HF_ENDPOINT="http://127.0.0.1:$(cat port)" HF_HOME="$folder/home"
cat > load.py <<'PYTHON'
import sys
import datasets

datasets.disable_progress_bars()
print(datasets.load_dataset("me/set", revision=sys.argv[1])["train"][0]["text"])
PYTHON
a=$(printf 'a%.0s' {1..40}) b=$(printf 'b%.0s' {1..40})
online="$("$folder/venv/bin/python" load.py "$a") $("$folder/venv/bin/python" load.py "$b")"
export HF_HUB_OFFLINE=1
offline="$("$folder/venv/bin/python" load.py "$a") $("$folder/venv/bin/python" load.py none-such)"
echo "online: $online; offline: $offline"
[ "$online" = "old new" ]
[ "$offline" = "new new" ]

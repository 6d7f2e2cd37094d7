#!/usr/bin/env bash
# One would guess that a download from the Hugging Face Hub that was cut goes on where it was when the same command is
# given again. huggingface_hub keeps what has come in an .incomplete file of its cache, and version 0.36 says of the
# option resume_download that it is not needed, since "downloads always resume when possible"; and there they do.
#
# In truth huggingface_hub 2.4 resumes (over plain HTTP) within one call alone, when the connection breaks. Each call
# has an .incomplete file of its own with a random name. Ctrl-C deletes it, and the next call begins at byte 0. A
# process that is killed leaves its file, and later calls neither go on with it nor delete it: each such attempt costs
# its bytes of disk, too, until `hf cache prune`.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 0.36.2 2.4.0; do
    python3 -m venv $version
    $version/bin/pip install --quiet --disable-pip-version-check huggingface_hub==$version
done

cat >show.py <<'PY'
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub

MB = 2**20
FILE = bytes(32 * MB)  # the library writes 10 MB at once
HEADERS = {"X-Repo-Commit": "a" * 40, "ETag": "b" * 64}
begins: list[int] = []  # the byte that each request for the file begins at
half = threading.Event()  # the next answer stops in the middle of the file, and
breaks = threading.Event()  # the connection breaks there


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine, with one model of one file."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        headers, status, body = dict(HEADERS), 200, FILE
        if "/resolve/" not in self.path:
            body = json.dumps({"id": "me/model", "sha": "a" * 40, "siblings": [{"rfilename": "model"}]}).encode()
        elif asked := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, body = 206, FILE[int(asked[1]) :]
            headers["Content-Range"] = f"bytes {asked[1]}-{len(FILE) - 1}/{len(FILE)}"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if "/resolve/" not in self.path:
            self.wfile.write(body)
            return
        begins.append(len(FILE) - len(body))
        if not half.is_set():
            self.wfile.write(body)
            return
        half.clear()
        self.wfile.write(body[: len(FILE) // 2])
        breaks.wait(60)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
server.daemon_threads = True
server.handle_error = lambda *_: None  # a client that was killed
threading.Thread(target=server.serve_forever, daemon=True).start()
OLD = [("0 | 10", [10], [])] * 3
NEW = [("0 10 |", [], []), ("0 | 0", [], []), ("0 | 0", [10], [10])]
found = []
for number, end in enumerate((None, signal.SIGINT, signal.SIGKILL)):
    cache = Path(f"home-{huggingface_hub.__version__}-{number}")
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache)}
    code = "import huggingface_hub; huggingface_hub.hf_hub_download('me/model', 'model')"

    def start():
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)

    def left():
        return [each.stat().st_size // MB for each in cache.rglob("*.incomplete")]

    begins.clear()
    half.set()
    breaks.clear()
    process = start()
    deadline = time.monotonic() + 60
    while left() != [10] and time.monotonic() < deadline:
        time.sleep(0.1)
    breaks.set() if end is None else process.send_signal(end)
    process.wait()
    breaks.set()
    at_the_end = left()
    begins.append(-1)  # the next process
    start().wait()
    asked = " ".join("|" if each < 0 else f"{each // MB}" for each in begins)
    how = "the connection breaks" if end is None else end.name
    print(f"huggingface_hub {huggingface_hub.__version__}, {how}: MB asked for from: {asked};", end=" ")
    print(f"MB left in .incomplete files: {at_the_end}, after another call {left()}")
    found.append((asked, at_the_end, left()))
sys.exit(found != {"0.36.2": OLD, "2.4.0": NEW}[huggingface_hub.__version__])
PY
for version in 0.36.2 2.4.0; do $version/bin/python show.py; done

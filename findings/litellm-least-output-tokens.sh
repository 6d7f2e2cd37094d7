#!/usr/bin/env bash
# One would guess that litellm sends `max_output_tokens` to an OpenAI-compatible server of one's own as it was given,
# or raises an error where it holds it to be too small; completion() does send `max_tokens` as it was given.
#
# In truth responses() raises every value below 16 to 16, which is OpenAI's own least, whatever the server at api_base
# allows, and says nothing. Who asks for one token, as classification by a single label does, pays for sixteen.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check litellm==1.110.2

cat >"$work/show.py" <<'PY'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

import litellm

got = {}


class Server(BaseHTTPRequestHandler):
    """Notes what it is asked, and refuses to answer."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        got[self.path] = asked.get("max_output_tokens", asked.get("max_tokens"))
        self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *about):
        pass


server = HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
place = dict(model="openai/mine", api_base=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", num_retries=0)
sent = []
for tokens in (1, 12, 40):
    for ask in (
        lambda: litellm.responses(input="yes or no?", max_output_tokens=tokens, **place),
        lambda: litellm.completion(messages=[{"role": "user", "content": "yes or no?"}], max_tokens=tokens, **place),
    ):
        try:
            ask()
        except litellm.exceptions.BadRequestError:
            pass
    sent.append((tokens, got["/v1/responses"], got["/v1/chat/completions"]))
print("litellm", version("litellm"))
for tokens, of_responses, of_completion in sent:
    print(f"asked for {tokens}: responses() sends {of_responses}, completion() sends {of_completion}")
sys.exit(sent != [(1, 16, 1), (12, 16, 12), (40, 40, 40)])
PY
LITELLM_LOCAL_MODEL_COST_MAP=True "$work/venv/bin/python" "$work/show.py"

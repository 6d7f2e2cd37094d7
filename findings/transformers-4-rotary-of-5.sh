#!/usr/bin/env bash
# One would guess that transformers 4.57 reads a GPT-NeoX model that transformers 5 has saved, or refuses it: the
# architecture, the names of the weights and the file format are the same.
#
# In truth 5 writes the share of each head that is rotated, and the base, under `rope_parameters` alone. 4.57 knows the
# older names rotary_pct and rotary_emb_base, finds neither, and takes its defaults (a quarter of the head) without a
# word. Where the model rotates another share, every weight loads and every score is another. Both spellings side by
# side in config.json are read rightly by both.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 "transformers==$version"
done
export HF_HUB_OFFLINE=1

cat >"$work/save.py" <<'PY'
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, initializer_range=0.5)
rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, rope_parameters=rotary)).save_pretrained("model")
PY
cat >"$work/score.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers

model = transformers.GPTNeoXForCausalLM.from_pretrained("model").eval()
with torch.no_grad():
    scores = model(torch.arange(20)[None]).logits
if Path("scores.pt").exists():
    apart = (scores - torch.load("scores.pt")).abs().max().item()
    print(f"transformers {transformers.__version__}: scores differ by {apart:.2g} of {scores.abs().max():.2g}")
    sys.exit(apart < 0.1 if sys.argv[1] == "apart" else apart > 1e-3)
print(f"transformers {transformers.__version__} writes", sorted(k for k in json.load(open("model/config.json")) if "rot" in k or "rope" in k))
torch.save(scores, "scores.pt")
PY
cat >"$work/both.py" <<'PY'
import json

config = json.load(open("model/config.json"))
json.dump({**config, "rotary_pct": 1.0, "rotary_emb_base": 10000}, open("model/config.json", "w"))
PY
cd "$work"
5.23.0/bin/python save.py
5.23.0/bin/python score.py first
4.57.6/bin/python score.py apart
5.23.0/bin/python both.py
4.57.6/bin/python score.py equal
5.23.0/bin/python score.py equal

#!/usr/bin/env bash
# One would guess that from_pretrained(folder, use_sliding_window=True, sliding_window=8, max_window_layers=0) gives a
# Qwen2 model whose layers look back 8 tokens, as the same three settings in config.json do; its config says so.
#
# In truth the model attends to everything. Keywords are set once the config has been made of the file, and what decides
# is config.layer_types, which has been worked out before. Attributes that are set on a config come too late in the same
# way. So does an edit of any config.json that save_pretrained has written: layer_types stands in it, one for each
# layer, where older files have none. Nothing warns. layer_types given along with the three is the cure. The same in
# Qwen3, and in transformers 4.57 and 5.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.23.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.13.0 numpy==2.4.6 "transformers==$version"
done
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

cat >"$work/show.py" <<'PY'
import json
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
LAYERS = {"layer_types": ["sliding_attention"] * 2}
CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 64, "vocab_size": 50, "initializer_range": 0.5,
}  # fmt: skip


def write(config: dict) -> None:
    with open(f"{family}/config.json", "w") as file:
        json.dump(config, file)


def scores(**keywords) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(family, **keywords).eval()(torch.arange(40)[None]).logits


transformers.utils.logging.disable_progress_bar()
failed = False
for family in "qwen2", "qwen3":
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIG)).save_pretrained(family)
    saved = json.load(open(f"{family}/config.json"))
    silent = {name: value for name, value in saved.items() if name != "layer_types"}  # as in older files
    write(silent)
    plain, changed = scores(), {}
    changed["as keywords"] = scores(**WINDOW)
    config = AutoConfig.from_pretrained(family)
    for name, value in WINDOW.items():
        setattr(config, name, value)
    changed["as attributes"] = scores(config=config)
    write(saved | WINDOW)
    changed["in a saved config.json"] = scores()
    write(silent | WINDOW)
    changed["in a config.json without layer_types"] = scores()
    write(silent)
    changed["as keywords, with layer_types"] = scores(**WINDOW, **LAYERS)
    found = {how: not torch.allclose(each, plain, atol=1e-3) for how, each in changed.items()}
    print(f"transformers {transformers.__version__}, {family}: a window has an effect: {found}")
    failed |= list(found.values()) != [False, False, False, True, True]
    shown = AutoConfig.from_pretrained(family, **WINDOW)
    failed |= (shown.use_sliding_window, shown.sliding_window, shown.max_window_layers) != (True, 8, 0)
sys.exit(failed)
PY
for version in 4.57.6 5.23.0; do
    (mkdir "$work/of-$version" && cd "$work/of-$version" && "$work/$version/bin/python" ../show.py)
done

"""transformers: what a user does with an exported model, in the versions that are in use."""

# client transformers-4.48: transformers==4.48.3 torch==2.13.0 numpy==2.4.6 Jinja2==3.1.6
# client transformers-4.57: transformers==4.57.3 torch==2.13.0 numpy==2.4.6 Jinja2==3.1.6
# client transformers-5.23: transformers==5.23.0 torch==2.13.0 numpy==2.4.6 Jinja2==3.1.6

import importlib
import os
from typing import Any

from bench.compatibility import gpt, ours, tried

transformers: Any = importlib.import_module("transformers")

BASE, SCRATCH = os.environ["BASE"], os.environ["SCRATCH"]
PROMPT = "Once upon a time"

gpt("export", BASE, "--out", f"{SCRATCH}/base")
with tried("model.generate(**tokenizer(text)) goes on as ours does"):
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{SCRATCH}/base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{SCRATCH}/base")
    prompt = tokenizer(PROMPT, return_tensors="pt")
    produced = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0].tolist()
    (expected,) = ours(BASE, count=16, **{"continue": [PROMPT]})["continued"]
    assert produced[prompt.input_ids.shape[1] :][: len(expected)] == expected

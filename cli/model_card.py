"""The README.md of an exported model: the Hub's model card, from what the run itself tells."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config import IMPORTED
from engine.errors import InputError
from engine.families import FAMILIES, family_of
from engine.hub import HUB_NAME
from engine.run import Run
from engine.runs import kind_of
from rlhf.preferences import STORIES_PREFERENCES
from train.data.sources import HUB_CONVERSATIONS, HUB_PREFERENCES, HUB_TEXTS, STORIES, STORIES_INSTRUCT
from train.tracking import evaluation_parts, read_metrics

ON_HUB = {name: path for name, (path, _) in HUB_TEXTS.items()} | HUB_CONVERSATIONS | HUB_PREFERENCES
# The Hub's own list of licences: https://huggingface.co/docs/hub/repositories-licenses.
LICENSE, HUB_MODEL = r"[a-z0-9][a-z0-9.+-]*", rf"{HUB_NAME}|\w[\w.-]*"
UNKNOWN = "unknown"
WRITTEN = (STORIES, STORIES_INSTRUCT, STORIES_PREFERENCES)
CHATTING = """messages = [{"role": "user", "content": "Tell me a story."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
WRITING = 'prompt = tokenizer("Once upon a time", return_tensors="pt")'


def model_card(run: Run, out: Path, which: str = "latest", *, license: str = UNKNOWN, base_model: str = "") -> str:
    """Return the card of a checkpoint that is exported to `out`. Raises InputError for what the Hub would refuse."""
    if not re.fullmatch(LICENSE, license):
        raise InputError(f"--license is {license!r}; it must be one of the Hub's names, such as mit or apache-2.0")
    if base_model and not re.fullmatch(HUB_MODEL, base_model):
        raise InputError(
            f"--base-model is {base_model!r}; it must be a name on the Hub, such as EleutherAI/pythia-160m"
        )
    recipe, model = run.read_recipe(), run.read_recipe().model
    family = family_of(model)
    kind = FAMILIES[family]["architectures"][0].removesuffix("ForCausalLM").replace("GPTNeoX", "GPT-NeoX")
    stages = [*history(run, run.find_checkpoint(which).step)]
    base = base_model or (recipe.name if re.fullmatch(HUB_NAME, recipe.name) else "")
    about = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [family, "gpt-from-text", *(["conversational"] if recipe.chat else [])],
        "datasets": sorted({stage["set"] for stage in stages if stage["set"]}),
        "base_model": base,
    }
    name, place = " ".join(run.path.resolve().name.split()), out.resolve().name
    lines = [
        "---",
        # JSON is YAML.
        *(f"{key}: {json.dumps(value)}" for key, value in about.items() if value),
        "---",
        "",
        f"# {name}",
        "",
        f"A {'chat' if recipe.chat else 'language'} model of {model.parameters:,} parameters: {kind} with "
        f"{model.shape}, a context of {model.context} tokens and a "
        f"vocabulary of {model.vocab_size:,}. "
        + (
            "It answers messages, by the chat template that it brings along."
            if recipe.chat
            else "It goes on with a text; it has not learnt to follow instructions."
        ),
        "",
        "## Training",
        "",
        "| stage | data | steps | tokens | on held-out data |",
        "|---|---|---|---|---|",
        *("| {kind} | {shown} | {steps} | {tokens} | {measured} |".format(**stage) for stage in stages),
        "",
        "Losses are nats per token; bits per byte compare with models of other tokenizers. Nobody has checked what it "
        "says for truth, bias or harm: a model of this size makes things up.",
        "",
        "## Licence",
        "",
        ("Whoever shares this model has not said under which terms" if license == UNKNOWN else f"`{license}`")
        + f"; those of {base + ' and of ' * bool(base)}its data hold in any case.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"place = {json.dumps(place)}  # this folder, or its name on the Hub",
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)",
        *(CHATTING if recipe.chat else WRITING).splitlines(),
        "ids = model.generate(**prompt, do_sample=True, temperature=0.8, max_new_tokens=100)[0]",
        'print(tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
        "With `gpt`, from this folder:",
        "",
        "```",
        f"gpt import {shlex.quote(place)} --out runs/model",
        "gpt chat runs/model" if recipe.chat else 'gpt generate runs/model "Once upon a time"',
        "gpt export runs/model --gguf --out model.gguf  # for llama.cpp, Ollama and LM Studio",
        "```",
        "",
    ]
    return "\n".join(lines)


def history(run: Run, step: int | None, later: tuple[Path, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield what each stage did that led to this step of a run, the first one first, as far back as runs are there."""
    recipe, place = run.read_recipe(), run.path.resolve()
    if place in later:  # it has taken the name of what it began with
        raise InputError(f"{place} began with itself")
    if recipe.base is not None:
        try:
            yield from history(Run(Path(recipe.base)), recipe.base_step, (*later, place))
        except InputError:
            nothing = dict.fromkeys(("set", "steps", "tokens", "measured"), "")
            yield nothing | {"kind": "before", "shown": "not known: that run is gone"}
    metrics = [line for line in read_metrics(run.metrics) if step is None or line["step"] <= step]
    evaluated = next((line for line in reversed(metrics) if "validation_loss" in line), None)
    tokens = next((line["tokens"] for line in reversed(metrics) if line.get("tokens")), 0)
    name, hub = recipe.data.source, None
    if name == IMPORTED:
        shown = "not known: trained elsewhere"
    elif name.partition(":")[0] in WRITTEN:
        shown = f"{name}: written by a program, not by people"
    elif hub := re.fullmatch(rf"({HUB_NAME})(:[\w.-]+)?", ON_HUB.get(name, name)):
        shown = f"[{hub[0]}](https://huggingface.co/datasets/{hub[1]})"
    else:
        # Where a file lies is nobody else's business.
        shown = f"{Path(name).name}: of whoever trained it"
    yield {
        "kind": kind_of(recipe),
        "set": hub and hub[1],
        "shown": shown,
        "steps": f"{metrics[-1]['step'] if metrics else 0:,}",
        "tokens": f"{tokens:,}",
        "measured": ", ".join(evaluation_parts(evaluated, "validation_")) if evaluated else "not measured",
    }

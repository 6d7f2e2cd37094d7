"""TRL: its DPOTrainer has our loss on the same pairs, for our chat model and for models of every family."""

# client trl: trl==1.16.0 torch==2.13.0 transformers==5.23.0 numpy==2.4.6 Jinja2==3.1.6

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from bench.compatibility import gpt, ours, tried

BASE, CHAT, SCRATCH = os.environ["BASE"], os.environ["CHAT"], os.environ["SCRATCH"]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": f"{SCRATCH}/hub",
    "ACCELERATE_USE_CPU": "1",
}
datasets: Any = importlib.import_module("datasets")
transformers: Any = importlib.import_module("transformers")
trl: Any = importlib.import_module("trl")

BETA = 0.2
PAIRS = [
    ("Tell me a story.", "Once upon a time there was a fox.", "No."),
    ("And\n now?", "The  end. \U0001f642", "The fox said: na\u00efve!"),
    ("Who?", "Tim", "Tim and the bear, who lived in a wood by the sea."),
]
# What each family alone has, and a window that is shorter than the texts.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {"no_rope_layer_interval": 2},
}


def their_loss(policy: str, reference: str) -> float:
    """Return the mean loss over the pairs, as a step of the trainer computes it."""
    models = [transformers.AutoModelForCausalLM.from_pretrained(each, dtype="float32") for each in (policy, reference)]
    # AutoTokenizer would take Qwen2's own for every qwen2, whatever tokenizer.json says.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(policy)
    say = [{"role": "assistant", "content": ""}]
    rows = [
        {"prompt": [{"role": "user", "content": asked}]}
        | {name: [say[0] | {"content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))}
        for asked, chosen, rejected in PAIRS
    ]
    options = trl.DPOConfig(
        output_dir=f"{SCRATCH}/trl", beta=BETA, per_device_train_batch_size=len(PAIRS), max_length=None, use_cpu=True,
        report_to=[], disable_tqdm=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model=models[0], ref_model=models[1], args=options, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    return float(trainer.compute_loss(trainer.model, batch).detach())


def write(family: str, seed: int, settings: dict[str, Any]) -> str:
    """Write a model of random weights with the tokenizer of our chat model, and import it."""
    folder = f"{SCRATCH}/{family}-{seed}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{SCRATCH}/chat")
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **shape | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm.weight" in name), std=0.1)
    model.save_pretrained(folder)
    for file in Path(SCRATCH, "chat").glob("*token*.json"):
        shutil.copy(file, folder)
    gpt("import", folder, "--out", f"{folder}-run")
    return folder


def compare(policy: str, reference: str, runs: tuple[str, str]) -> str:
    pairs = [[{"role": "user", "content": asked}, chosen, rejected] for asked, chosen, rejected in PAIRS]
    mine = ours(runs[0], reference=runs[1], pairs=pairs, beta=BETA)["dpo"]
    theirs = their_loss(policy, reference)
    if abs(mine - theirs) >= 1e-4 * max(1, abs(theirs)):
        raise ValueError(f"DPO's loss is {mine} by ours and {theirs} by TRL")
    return f"{theirs:.6f}, difference {abs(mine - theirs):.1e}"


for run, name in ((BASE, "base"), (CHAT, "chat")):
    gpt("export", run, "--out", f"{SCRATCH}/{name}")
for file in Path(SCRATCH, "chat").glob("*token*.json"):
    shutil.copy(file, f"{SCRATCH}/base")
with tried("DPOTrainer's loss of our chat model against our base model is ours") as say:
    say(compare(f"{SCRATCH}/chat", f"{SCRATCH}/base", (CHAT, BASE)))
for family, settings in FAMILIES.items():
    with tried(f"DPOTrainer's loss of a {family} that it can train is ours") as say:
        policy, reference = (write(family, seed, settings) for seed in (1, 2))
        say(compare(policy, reference, (f"{policy}-run", f"{reference}-run")))

"""Export to Hugging Face's format and import from it, without transformers: weights, settings and tokenizers."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint, disk
from engine.config import IMPORTED, BudgetConfig, DataConfig, LoopConfig, OptimizerConfig, Recipe, override, step_rows
from engine.errors import InputError
from engine.families import our_config, our_tensors, their_config, their_tensors
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime
from engine.tokenizer_json import exported, import_tokenizer, read_json

# AdamW has trained what others did, and goes on; a finetuning takes 0.3 of these rates (train/finetune.py). Adam's fall
# with the width (Yang 2022, arXiv:2203.03466): to 2e-5 at 4,096, as Zephyr 7B has it, from 1.4e-3 at 64, where 80 steps
# bring a loss of 3.6 to 2.3 with 1e-4, 1.2 with 1e-3 and 0.9 with 3e-3.
RATE_BY_WIDTH = 0.3

EXPORTED_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|chat_template)\.json|"
    r"chat_template\.jinja|model\.safetensors|README\.md"
)


def export(
    run: Run, out: Path, which: str = "latest", notice: Callable[[str], None] = lambda message: None, card: str = ""
) -> list[Path]:
    """Write a checkpoint of a run into the folder `out`, for transformers and what else reads its files.

    `card` is the text of its README.md, if it is to have one.
    """
    from safetensors.torch import save_file

    model, tokenizer = run.load_model(Runtime(torch.device("cpu"), "fp32"), which, notice)
    chat = run.read_recipe().chat
    files, ids = exported(tokenizer, model.config.context, chat=chat)
    if not chat and model.config.came_with:
        _leave_out_chat_tokens(model, files, model.config.came_with)
    files["config.json"] = json.dumps(their_config(model.config) | ids, indent=2) + "\n"
    with disk.writing(out, 4 * model.config.parameters):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content.encode())
        if card:
            (out / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        save_file(their_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
        disk.share_as(out / "model.safetensors", out / "config.json")
    return sorted(path for path in out.iterdir() if EXPORTED_FILES.fullmatch(path.name))


def import_(
    folder: Path,
    out: Path,
    *,
    name: str = "",
    revision: str | None = None,
    context: int | None = None,
    notice: Callable[[str], None] = lambda message: None,
) -> Recipe:
    """Make a run, with one checkpoint of step 0, of a folder of one of the FAMILIES: config, safetensors, tokenizer.

    `name` and `revision` are those of a model of the Hub; `context` is how many tokens the run is to see at once.

    A special token of ours that the tokenizer lacks takes a spare row of the embedding, or else a new one. Raises
    InputError for what the model cannot be, or the folder lacks.
    """
    described = folder / "config.json"
    try:
        values = read_json(described)
        config = our_config(values)
    except InputError as error:
        raise InputError(f"{described}: {error}") from None
    if context is not None and context > config.context:
        raise InputError(f"--context is {context}; it must be at most the model's own, {config.context}")
    config, rate = dataclasses.replace(config, context=context or config.context), RATE_BY_WIDTH / config.width
    # A run has a whole recipe; data and budget of this one say nothing of how the model came to be. What is finetuned
    # begins with its optimizer and its batch.
    recipe = Recipe(
        name=name or folder.resolve().name,
        model=config,
        data=DataConfig(source=IMPORTED, revision=revision),
        budget=BudgetConfig(steps=1),
        optimizer=OptimizerConfig("adamw", rate, rate, rate, rate, eps=1e-8),
        loop=LoopConfig(batch=step_rows(config.context)),
    )
    tensors = our_tensors(_read_tensors(folder), recipe.model)
    biases = [name for name in tensors if name.endswith("bias")]
    if recipe.model.biases and not any(tensors[name].any() for name in biases):
        # Ours had none before they were exported: GPT-NeoX cannot do without those of norms and MLPs.
        recipe = override(recipe, "model.biases", False)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
    tokenizer, chat = import_tokenizer(folder, values, recipe.model.vocab_size, notice)
    for name in {"embedding.weight", "head.weight"} & tensors.keys():
        # A new token's row is drawn around the mean of all, which hardly shifts a prediction (Hewitt 2021,
        # "Initializing new word embeddings for pretrained language models"). Where adapters learn, like stays like.
        old = tensors[name]
        drawn = torch.randn(tokenizer.vocab_size - len(old), old.shape[1], generator=torch.Generator().manual_seed(0))
        tensors[name] = torch.cat([old, old.mean(0) + old.std(0) * drawn])
    if tokenizer.vocab_size > config.vocab_size:
        recipe = override(recipe, "model.came_with", config.vocab_size)
    recipe = dataclasses.replace(override(recipe, "model.vocab_size", tokenizer.vocab_size), chat=chat)
    run = Run(out)
    with disk.writing(out):
        run.write_recipe(recipe)
        tokenizer.save(run.path / tokenizer.file_name)
        checkpoint.save(run.checkpoints, 0, {"model": tensors}, {}, identity=run.identity(recipe))
    return recipe


def _leave_out_chat_tokens(model: GPT, files: dict[str, str], rows: int) -> None:
    """Take from a model that came with so many tokens those that it was given to learn to chat with."""
    model.config = dataclasses.replace(model.config, vocab_size=rows)
    tables: tuple[Any, ...] = (model.embedding, model.head)
    for table in filter(None, tables):
        table.weight = torch.nn.Parameter(table.weight.detach()[:rows])
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    gone = {each["content"] for each in added if each["id"] >= rows}
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "additional_special_tokens")):
        content = json.loads(files.get(name, "{}"))
        if key in content:
            named = ((each["content"] if isinstance(each, dict) else each, each) for each in content[key])
            content[key] = [each for name, each in named if name not in gone]
            files[name] = json.dumps(content, ensure_ascii=False)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # The weights are in one file, or in numbered parts.
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        if pickled is None:
            raise InputError(f"{folder} has no model.safetensors")
        raise InputError(
            f"{pickled} is a pickle, which may run any code when it is read; where you trust it, convert it with "
            f"transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    index = folder / "model.safetensors.index.json"
    parts = read_json(index).get("weight_map") if index.exists() else {}
    named = set(map(str, parts.values())) if isinstance(parts, dict) else {"a weight_map"}
    if missing := named - {file.name for file in files}:
        raise InputError(f"{index} names {min(missing)}, which is not there; copy or download the whole folder again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged: {error}") from None
        if twice := next(iter(found.keys() & tensors.keys()), None):
            raise InputError(f"{file} and another file both hold the tensor {twice}; leave one model in {folder}")
        tensors |= found
    return tensors

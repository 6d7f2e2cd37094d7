"""Pretraining: documents -> tokenizer -> token files -> batches -> the loop."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.chat_template import text_ends
from engine.config import Recipe, override
from engine.errors import InputError
from engine.generate import document_prompt, generate
from engine.initial import DISTANCES, weights_of_text
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer, train_tokenizer
from train.data.encoded import Encoded
from train.data.loader import Batches, PackedLoader
from train.data.shards import TokenShards, is_prepared, prepare
from train.data.sources import HubUnreachable, open_source
from train.data.splits import Source
from train.data.stream import StreamLoader
from train.evaluation import evaluate_loss
from train.stage import Amounts, Outcome, Stage
from train.tracking import Console
from train.trainer import run_stage

# From more text than this per token of its vocabulary, a tokenizer learns little.
SAMPLE_BYTES_PER_TOKEN = 1000
# If the Hub cannot be reached, this many built-in stories replace a data set that has an end.
FALLBACK_STORIES = 100_000
SPLITS_USED = ("train", "validation")
SAMPLE_TOKENS = 200
# Of how many tokens of the text it is counted which follows which: a second's work.
COUNTED = 5_000_000

TokenDataset = TokenShards | Encoded


def pretrain(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Train as the recipe says and leave everything in the run's folder. `resume` continues its newest checkpoint.

    Raises InputError for what the user can fix, TrainingError if the loss stays not finite.
    """
    if recipe.lora.rank:
        raise InputError("lora.rank must be 0 here: adapters are for runs that begin with the weights of another one")
    prepare = partial(read_documents, run=run, runtime=runtime, console=console)
    return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)


def read_documents(recipe: Recipe, run: Run, runtime: Runtime, console: Console) -> Stage:
    """Return the stage that learns documents. Its recipe holds what the data decided: vocabulary and source."""
    train: TokenDataset | None = None
    batches: Batches
    if recipe.data.stream:
        if is_prepared(recipe.data.source):
            raise InputError(f"{recipe.data.source} is prepared already: train on it without --stream")
        recipe, source = find_source(recipe, console)
        tokenizer, (validation,) = tokenize(recipe, source, run, console, "validation")
        size = (recipe.tokens_per_pass, recipe.model.context)
        batches = StreamLoader(source, tokenizer, validation, *size, processes=runtime.processes)
    else:
        recipe, tokenizer, train, validation = prepare_documents(recipe, run, console)
        size = (recipe.tokens_per_pass, recipe.model.context)
        batches = PackedLoader(train, *size, seed=recipe.loop.seed, processes=runtime.processes)
    recipe = override(recipe, "model.vocab_size", tokenizer.vocab_size)
    sample = partial(begin_documents, tokenizer=tokenizer, recipe=recipe)
    stage = text_stage(recipe, tokenizer, train, validation, batches, sample)
    if recipe.model.start != "bigrams":
        return stage
    if not isinstance(train, TokenShards):
        return dataclasses.replace(stage, notes=("start      without bigrams: a stream is not read beforehand",))
    steps = stage.budget.steps
    most = min(COUNTED, train.tokens, math.inf if steps is None else steps * recipe.tokens_per_step)
    return dataclasses.replace(
        stage,
        begin=partial(begin_with_bigrams, train=train, most=most, runtime=runtime),
        notes=(f"start      by which token follows which in {most:,} tokens of the text",),
    )


def begin_with_bigrams(model: GPT, *, train: TokenShards, most: float, runtime: Runtime) -> None:
    """Set weights by which token follows which in the text: see engine/initial.py."""

    def found() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(torch.initial_seed())
        return weights_of_text(model, count_pairs(train, most, 1 + max(DISTANCES[0])), generator)

    # Computed by one process: where a model is sharded, the shards of several must be of the same one.
    model.load_state_dict(runtime.processes.from_main(found), strict=False)


def count_pairs(train: TokenShards, most: float, distances: int) -> list[Tensor]:
    """Return how often each token comes 1, 2, ... `distances` tokens after each: sparse fp32 [V, V].

    Counted are about `most` tokens, in documents from all of the text.
    """
    lengths, vocab = train.lengths, train.vocab_size
    wanted = max(1, math.floor(len(lengths) * min(1.0, most / train.tokens)))
    texts, found = [], []
    for document in np.linspace(0, len(lengths) - 1, wanted, dtype=np.int64).tolist():
        # One document may be longer than all that is wanted.
        inputs, targets = train.read(document, 0, int(min(lengths[document], most)))
        texts.append(np.append(inputs, targets[-1]).astype(np.int64))
    for distance in range(1, distances + 1):
        pairs, counts = np.unique(
            np.concatenate([ids[:-distance] * vocab + ids[distance:] for ids in texts]), return_counts=True
        )
        places = torch.from_numpy(np.stack(np.divmod(pairs, vocab)))
        found.append(
            torch.sparse_coo_tensor(
                places, torch.from_numpy(counts).float(), (vocab, vocab), is_coalesced=True, check_invariants=True
            )
        )
    return found


def text_stage(
    recipe: Recipe,
    tokenizer: Tokenizer,
    train: TokenDataset | None,
    validation: TokenDataset,
    batches: Batches,
    sample: Callable[[GPT], list[str]],
) -> Stage:
    """Return a stage that learns the next token. `train` is None for a stream, whose length nobody knows."""
    text = train or validation
    amount = f"{train.tokens:,} tokens to train on" if train else "streamed"
    amount += f", {validation.tokens:,} tokens to validate; {text.bytes / text.tokens:.2f} bytes per token"

    def learnt(steps: int, epochs: float) -> str:
        # Conversations leave padding.
        tokens = f"{'up to ' if recipe.chat else ''}{steps * recipe.tokens_per_step:,} tokens"
        return f"{tokens}, {epochs:.2f} epochs" if train else tokens

    return Stage(
        recipe,
        batches,
        evaluate=partial(evaluate_loss, documents=validation, byte_lengths=tokenizer.byte_lengths),
        sample=sample,
        amounts=Amounts(amount, learnt),
        byte_lengths=torch.from_numpy(tokenizer.byte_lengths),
    )


def prepare_documents(recipe: Recipe, run: Run, console: Console) -> tuple[Recipe, Tokenizer, TokenShards, TokenShards]:
    """Return tokenizer and token files for a recipe: those to train on and those to validate on.

    Goes on where an interrupted preparation of the same run stopped.
    """
    folder = Path(recipe.data.source)
    if not is_prepared(folder):
        folder = run.data
        if not all(is_prepared(folder, split) for split in SPLITS_USED):
            recipe, source = find_source(recipe, console)
            tokenize(recipe, source, run, console, *SPLITS_USED)
    tokenizer = Tokenizer.load(folder)
    if not run.tokenizer.exists():
        tokenizer.save(run.path / tokenizer.file_name)
    elif Tokenizer.load(run.tokenizer).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{folder} has another tokenizer than {run.path} began with; choose other --data")
    train, validation = (TokenShards(folder, split, tokenizer.fingerprint) for split in SPLITS_USED)
    for each in (train, validation):
        each.check(tokenizer.begin)
    return recipe, tokenizer, train, validation


def tokenize(
    recipe: Recipe, source: Source, run: Run, console: Console, *splits: str
) -> tuple[Tokenizer, list[TokenShards]]:
    """Tokenize splits of the source into the run's folder, with the run's tokenizer."""
    source.say = console.say
    console.say(source.describe())
    tokenizer, found = find_tokenizer(recipe, source, run, console), []
    limits = {"train": recipe.data.tokens, "validation": recipe.data.final_evaluation_tokens}
    for split in splits:
        shards = prepare(source, tokenizer, run.data, split, max_tokens=limits[split])
        # A source that writes its documents itself reads no rows, and leaves none out.
        if source.rows or recipe.data.stream:
            console.say(f"{split:10} {source.describe_read(shards.documents)}")
        found.append(shards)
    console.say(f"held out   {source.held_out_by}")
    return tokenizer, found


def find_tokenizer(recipe: Recipe, source: Source, run: Run, console: Console) -> Tokenizer:
    """Return the run's tokenizer; if it has none yet, the one that the recipe names, or one trained on the source."""
    if run.tokenizer.exists():
        return Tokenizer.load(run.tokenizer)
    if recipe.data.tokenizer is not None:
        tokenizer = Tokenizer.load(recipe.data.tokenizer)
    else:
        sample_bytes = SAMPLE_BYTES_PER_TOKEN * recipe.model.vocab_size
        documents = source.documents("train")
        tokenizer = train_tokenizer(documents, recipe.model.vocab_size, sample_bytes=sample_bytes, notice=console.say)
    tokenizer.save(run.path / tokenizer.file_name)
    return tokenizer


def find_source(recipe: Recipe, console: Console) -> tuple[Recipe, Source]:
    """Return the source of a recipe; where the Hub cannot be reached its fallback, and say so."""
    data = recipe.data
    try:
        options: dict[str, Any] = {"holdout": data.holdout, "limit": data.documents, "commit": data.revision}
        source = open_source(data.source, column=data.column, **options)
        source.documents("train")  # reads the first one
    except HubUnreachable as error:
        if data.fallback is None:
            raise
        reason = str(error).partition(";")[0]
        console.say(f"{reason}; using the built-in {data.fallback} instead (--data {data.source} insists)")
        documents = data.documents or FALLBACK_STORIES
        other = dataclasses.replace(
            data, source=data.fallback, fallback=None, column=None, documents=documents, revision=None
        )
        return dataclasses.replace(recipe, data=other), open_source(data.fallback, limit=documents)
    if data.source == "stories" and data.documents is None and recipe.budget.epochs is not None:
        raise InputError("the built-in stories never end, so an epoch needs a number: --set data.documents=40000")
    return recipe, source


def begin_documents(model: GPT, tokenizer: Tokenizer, recipe: Recipe) -> list[str]:
    """Return documents that the model begins by itself, with the same seeds at every step, to compare."""
    prompts = [document_prompt(tokenizer, "")] * recipe.loop.samples
    return say(model, tokenizer, prompts, text_ends(tokenizer, chat=recipe.chat))


def say(model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], ends: frozenset[int]) -> list[str]:
    """Return how the model goes on after each prompt."""
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=0)
    most = min(SAMPLE_TOKENS, model.config.context - 1)
    completions = generate(model, tokenizer, prompts, sampling, max_tokens=most, stop_ids=ends)
    return [completion.text.strip() for completion in completions]

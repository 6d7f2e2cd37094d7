"""Finetuning: the weights of a run go on learning, from conversations or other documents, in a run of their own."""

import dataclasses
from functools import partial
from pathlib import Path

from engine.chat_template import answer_ends
from engine.checkpoint import Checkpoint, checkpoints
from engine.config import AlignmentConfig, BudgetConfig, DataConfig, LoraConfig, Recipe
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer
from train.data.encoded import Conversations
from train.data.loader import PackedLoader
from train.data.sources import open_conversations
from train.data.splits import Source
from train.pretrain import read_documents, say, text_stage
from train.stage import Outcome, Stage
from train.tracking import Console
from train.trainer import run_stage

# The share of pretraining's learning rates. After as many steps nano's loss is as low with 0.1, and higher with 1.
RATE = 0.3


def finetuning_recipe(base: Run, checkpoint: Checkpoint, data: DataConfig, rate: float | None = None) -> Recipe:
    """Return the recipe that goes on from a run: one epoch of the data, with its learning rates times `rate`.

    Raises InputError where `data` names nothing.
    """
    before = base.read_recipe()
    if before.scores:
        raise InputError(f"{base.path} is a reward model; name the run that it began with, {before.base}")
    # The rates of a run that was finetuned itself are low already.
    share = rate if rate is not None else RATE if before.base is None else 1.0
    rates = {name: share * peak for name, peak in vars(before.optimizer).items() if name.endswith("_rate")}
    origin = before.optimizer.origin if share == 1 else f"{share:g} times those of {base.path}"
    return dataclasses.replace(
        before,
        budget=BudgetConfig(epochs=1),
        data=data,
        optimizer=dataclasses.replace(before.optimizer, **rates, origin=origin),
        lora=LoraConfig(),
        alignment=AlignmentConfig(),
        precision="auto",
        chat=before.chat or open_conversations(data) is not None,
        base=str(base.path.resolve()),
        base_step=checkpoint.step,
        base_weights=checkpoint.checksum("model"),
    )


def finetune(
    recipe: Recipe, run: Run, runtime: Runtime, console: Console, *, resume: bool = False, wandb: bool = False
) -> Outcome:
    """Finetune as the recipe says, from recipe.base, with a fresh optimizer. Otherwise as `pretrain`."""

    def prepare(recipe: Recipe) -> Stage:
        # Once the run has weights of its own, its base may be gone.
        base = None if resume and run.has_checkpoint() else load_base(recipe, run)
        source = open_conversations(recipe.data)
        if source is None:
            stage = read_documents(recipe, run, runtime, console)
        else:
            stage = read_conversations(recipe, source, Tokenizer.load(run.tokenizer), runtime, console)
        if (model := stage.recipe.model) != recipe.model:
            raise InputError(f"{stage.recipe.data.source} has a vocabulary of {model.vocab_size}, not the model's")
        origin = f"base       {recipe.base}, step {recipe.base_step}"
        return dataclasses.replace(stage, base=base, notes=(*stage.notes, origin))

    return run_stage(recipe, run, runtime, console, prepare, resume=resume, wandb=wandb)


def load_base(recipe: Recipe, run: Run) -> Checkpoint:
    """Return the checkpoint to begin with. Its tokenizer becomes the run's. Raises InputError for another model."""
    base = Run(Path(str(recipe.base)))
    checkpoint = base.find_checkpoint(str(recipe.base_step))
    if not _same_shape(recipe, base):
        raise InputError(f"the weights of {base.path} are of another model: leave --set model... but model.context")
    if recipe.base_weights not in (None, checkpoint.checksum("model")):
        raise InputError(f"{checkpoint.path} has other weights than those that {run.path} began with: bring these back")
    tokenizer = Tokenizer.load(base.tokenizer)
    if not run.tokenizer.exists():
        tokenizer.save(run.path / tokenizer.file_name)
    return checkpoint


def recognise_base(recipe: Recipe, run: Run, named: Run) -> Recipe:
    """Return the recipe of a run that began with the run `named`, wherever that is by now.

    The base is recognised by its weights; where they are gone (pruned, say) or were never noted, by its path. Raises
    InputError for another run, with what differs.
    """
    path, noted = named.path.resolve(), Path(str(recipe.base))
    found = next((each for each in checkpoints(named.checkpoints) if each.step == recipe.base_step), None)
    weights = found and found.checksum("model")
    if named.config.exists():
        differs = {
            "its model has another shape": not _same_shape(recipe, named),
            "it has another tokenizer": run.tokenizer.exists()
            and Tokenizer.load(named.tokenizer).fingerprint != Tokenizer.load(run.tokenizer).fingerprint,
            f"its weights at step {recipe.base_step} are others": None not in (weights, recipe.base_weights)
            and weights != recipe.base_weights,
        }
        if reason := next((reason for reason, holds in differs.items() if holds), None):
            alone = recipe.alignment.method == "none" and run.has_checkpoint()
            raise InputError(
                f"{run.path} did not begin with {named.path} as it is now: {reason}; bring back what was there"
                + (f", or move it away: {run.path} can go on without a base" if alone else "")
            )
    told = weights is not None and weights == recipe.base_weights
    # An older run did not note the weights of its base. If that has been moved, its name and step must be enough.
    moved = recipe.base_weights is None and found is not None and path.name == noted.name and not noted.exists()
    if not (told or moved or path == noted):
        raise InputError(f"{run.path} did not begin with {named.path}, but with {recipe.base}; name its --out")
    return dataclasses.replace(recipe, base=str(path))


def _same_shape(recipe: Recipe, base: Run) -> bool:
    # No weights depend on the context, and a reward model brings its own head.
    free = {name: getattr(recipe.model, name) for name in ("context", "scalar_head")}
    return dataclasses.replace(base.read_recipe().model, **free) == recipe.model


def read_conversations(
    recipe: Recipe, source: Source, tokenizer: Tokenizer, runtime: Runtime, console: Console
) -> Stage:
    """Return the stage that learns the assistant's part of conversations."""
    train, validation = Conversations.read_splits(recipe, tokenizer, source, console)
    size = (recipe.tokens_per_pass, recipe.model.context)
    batches = PackedLoader(train, *size, seed=recipe.loop.seed, processes=runtime.processes, whole=True)
    sample = partial(answer_held_out, tokenizer=tokenizer, held_out=validation, count=recipe.loop.samples)
    stage = text_stage(recipe, tokenizer, train, validation, batches, sample)
    return dataclasses.replace(stage, notes=train.describe_beside(validation))


def answer_held_out(model: GPT, tokenizer: Tokenizer, held_out: Conversations, count: int) -> list[str]:
    """Return what the model answers to the first held-out requests."""
    prompts = [held_out.prompt(number) for number in range(min(count, len(held_out)))]
    answers = say(model, tokenizer, prompts, answer_ends(tokenizer))
    return [f"> {tokenizer.decode(prompt)}\n\n{answer}" for prompt, answer in zip(prompts, answers, strict=True)]

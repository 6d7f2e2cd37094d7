"""gpt rlhf ppo, grpo, dpo: alignment runs. What needs no training is in cli/rlhf_answers.py."""

from pathlib import Path
from typing import Annotated

import typer

from cli import rlhf_answers, training
from cli.options import (
    CheckpointName,
    ChosenColumn,
    Device,
    Precision,
    PromptColumn,
    RejectedColumn,
    RunArgument,
)
from engine.errors import InputError

app = typer.Typer(
    help="Align a chat model: from rewards (ppo, grpo), from preferences (dpo), or by choosing (best-of-n).",
    no_args_is_help=True,
)
app.command("best-of-n")(rlhf_answers.best_of_n)
app.command("pairs")(rlhf_answers.pairs)

Rounds = Annotated[int | None, typer.Option(min=1, help="Rollouts of alignment.answers answers; 40 unless given.")]
Beta = Annotated[float | None, typer.Option(help="The price of KL to the model it begins with: higher stays closer.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate at the start; it falls to 0.")]
Answers = Annotated[int | None, typer.Option("--batch", min=1, help="Answers in a step; 32 unless given.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the answers and the order of the prompts.")]


@app.command("ppo")
def ppo(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run; RUN-ppo unless given.")] = None,
    reward: rlhf_answers.Reward = None,
    data: rlhf_answers.Prompts = None,
    prompt_column: PromptColumn = None,
    rounds: Rounds = None,
    beta: Beta = None,
    kl_target: Annotated[float | None, typer.Option(help="Steer beta so that answers have this KL, in nats.")] = None,
    rate: Rate = None,
    batch: Answers = None,
    checkpoint: CheckpointName = "latest",
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Seed = None,
    setting: training.Setting = None,
    resume: training.Resume = False,
    overwrite: training.Overwrite = False,
    wandb: training.WandB = False,
    gpus: training.Gpus = None,
    nodes: training.Nodes = None,
    rendezvous: training.Rendezvous = None,
) -> None:
    """Proximal policy optimisation: answers are drawn and scored, a critic says which token earned what.

    Example: gpt rlhf ppo runs/nano-chat --reward runs/nano-chat-reward

    Example: gpt rlhf ppo runs/nano-chat --reward program --rounds 20 --set alignment.answers=64
    """
    training.distribute(gpus, nodes, rendezvous)
    _align(
        "ppo",
        run,
        out,
        data,
        columns={"prompt_column": prompt_column},
        reward=reward,
        rounds=rounds,
        config={"beta": beta, "kl_target": kl_target},
        rate=rate,
        batch=batch,
        checkpoint=checkpoint,
        machine=(device, precision),
        seed=seed,
        setting=setting,
        resume=resume,
        overwrite=overwrite,
        wandb=wandb,
    )


@app.command("grpo")
def grpo(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run; RUN-grpo unless given.")] = None,
    reward: rlhf_answers.Reward = None,
    data: rlhf_answers.Prompts = None,
    prompt_column: PromptColumn = None,
    rounds: Rounds = None,
    beta: Beta = None,
    group: Annotated[int | None, typer.Option(help="Answers to each prompt, compared with one another; or 8.")] = None,
    rate: Rate = None,
    batch: Answers = None,
    checkpoint: CheckpointName = "latest",
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Seed = None,
    setting: training.Setting = None,
    resume: training.Resume = False,
    overwrite: training.Overwrite = False,
    wandb: training.WandB = False,
    gpus: training.Gpus = None,
    nodes: training.Nodes = None,
    rendezvous: training.Rendezvous = None,
) -> None:
    """Group relative policy optimisation: answers to the same prompt are compared with one another, without a critic.

    Example: gpt rlhf grpo runs/nano-chat --reward runs/nano-chat-reward
    """
    training.distribute(gpus, nodes, rendezvous)
    _align(
        "grpo",
        run,
        out,
        data,
        columns={"prompt_column": prompt_column},
        reward=reward,
        rounds=rounds,
        config={"beta": beta, "group": group},
        rate=rate,
        batch=batch,
        checkpoint=checkpoint,
        machine=(device, precision),
        seed=seed,
        setting=setting,
        resume=resume,
        overwrite=overwrite,
        wandb=wandb,
    )


@app.command("dpo")
def dpo(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run; RUN-dpo, or RUN-ipo, unless given.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Preferences: stories-preferences (unless told else), hh-rlhf, ultrafeedback_binarized, a Hub data "
            "set owner/name or a file, such as `gpt rlhf pairs` writes."
        ),
    ] = None,
    prompt_column: PromptColumn = None,
    chosen_column: ChosenColumn = None,
    rejected_column: RejectedColumn = None,
    steps: training.Steps = None,
    tokens: training.Tokens = None,
    epochs: training.Epochs = None,
    minutes: training.Minutes = None,
    beta: Beta = None,
    ipo: Annotated[
        bool, typer.Option("--ipo", help="Learn by IPO's loss, which does not overfit to sure pairs.")
    ] = False,
    label_smoothing: Annotated[float | None, typer.Option(help="The share of preferences that may be wrong.")] = None,
    rate: Rate = None,
    batch: training.Batch = None,
    checkpoint: CheckpointName = "latest",
    device: Device = "auto",
    precision: Precision = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of the order of the pairs.")] = None,
    setting: training.Setting = None,
    resume: training.Resume = False,
    overwrite: training.Overwrite = False,
    wandb: training.WandB = False,
    gpus: training.Gpus = None,
    nodes: training.Nodes = None,
    rendezvous: training.Rendezvous = None,
) -> None:
    """Direct preference optimisation: from pairs of answers, without a reward model. One epoch unless told else.

    Example: gpt rlhf dpo runs/nano-chat --data runs/nano-chat/pairs.jsonl

    Example: gpt rlhf dpo runs/tiny-chat --data ultrafeedback_binarized --set model.context=1024 --ipo
    """
    training.distribute(gpus, nodes, rendezvous)
    _align(
        "ipo" if ipo else "dpo",
        run,
        out,
        data,
        columns={
            "prompt_column": prompt_column,
            "chosen_column": chosen_column,
            "rejected_column": rejected_column,
        },
        budgets={"steps": steps, "tokens": tokens, "epochs": epochs, "minutes": minutes},
        config={"beta": beta, "label_smoothing": label_smoothing},
        rate=rate,
        batch=batch,
        checkpoint=checkpoint,
        machine=(device, precision),
        seed=seed,
        setting=setting,
        resume=resume,
        overwrite=overwrite,
        wandb=wandb,
    )


def _align(
    method: str,
    run: Path,
    out: Path | None,
    data: str | None,
    *,
    columns: dict[str, str | None],
    reward: str | None = None,
    rounds: int | None = None,
    budgets: dict[str, float | None] | None = None,
    config: dict[str, object],
    rate: float | None,
    batch: int | None,
    checkpoint: str,
    machine: tuple[str, str],
    seed: int | None,
    setting: list[str] | None,
    resume: bool,
    overwrite: bool,
    wandb: bool,
) -> None:
    from engine.config import AlignmentConfig, DataConfig, override, override_text
    from engine.run import Run
    from rlhf.align import align, alignment_recipe, check_reward
    from rlhf.preferences import STORIES_PREFERENCES

    device, precision = machine
    target = Run(out or run.with_name(f"{run.name}-{method}"))
    pairs = budgets is not None
    if resume:
        named = (data, *columns.values(), reward, *config.values(), checkpoint)
        changes = (*named, rounds, rate, batch, seed, setting, overwrite, precision)
        training.refuse_changes(*changes, length=pairs)
        recipe = training.resumed(target, run, f"a run of {method}")
    else:
        base = Run(run)
        aligned = AlignmentConfig(method=method)  # type: ignore[arg-type]
        if not pairs:
            aligned = override(aligned, "reward", rlhf_answers.named_reward(run, reward))
        for name, value in config.items():
            aligned = aligned if value is None else override(aligned, name, value)
        # They decide how many steps make a round, so they come before the rest of the recipe.
        for each in setting or []:
            if each.startswith("alignment."):
                aligned = override_text(aligned, training.located_setting(each).removeprefix("alignment."))
        setting = [each for each in setting or [] if not each.startswith("alignment.")]
        source = rlhf_answers.prompt_data(base, data, columns["prompt_column"])
        if pairs:
            source = DataConfig(source=training.located(data or STORIES_PREFERENCES), **columns)  # type: ignore[arg-type]
        sizes = {name: value for name, value in {"rounds": rounds, "batch": batch}.items() if value is not None}
        recipe = alignment_recipe(base, base.find_checkpoint(checkpoint), source, aligned, rate=rate, **sizes)
        if target.path.resolve() == run.resolve():
            raise InputError(f"{run} cannot be aligned into itself; choose another folder with --out")
    recipe = training.adjust(recipe, budgets or {}, {"loop.seed": seed, "precision": precision}, setting)
    typer.echo(f"{run} is aligned into {target.path} by {method}")
    command = f"gpt rlhf {'dpo' if pairs else method} {run}{' --ipo' * (method == 'ipo')}"
    training.start(
        align,
        recipe,
        target,
        device,
        command,
        check=lambda: check_reward(recipe),
        resume=resume,
        overwrite=overwrite,
        wandb=wandb,
    )

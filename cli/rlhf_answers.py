"""gpt rlhf best-of-n, gpt rlhf pairs: what a chat model's own answers are good for, without training it."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from cli.console import FRAMELESS, Console, print_table
from cli.options import CheckpointName, Few, Machine, PromptColumn, RunArgument, Seed, Temperature
from cli.training import located
from engine.errors import InputError
from engine.folders import require_free

if TYPE_CHECKING:
    from engine.config import DataConfig
    from engine.run import Run

REWARDS = "The run of a reward model, or `program`, which checks the built-in stories; RUN-reward unless given."
PROMPTS = "Prompts, or conversations as for gpt finetune for theirs; those that RUN was finetuned on unless given."
Reward = Annotated[str | None, Option(help=REWARDS)]
Prompts = Annotated[str | None, Option("--data", help=PROMPTS)]


def named_reward(run: Path, reward: str | None) -> str:
    """Return the reward that was asked for, or the reward model that stands beside the run. Raises InputError."""
    if reward is not None:
        return located(reward)
    beside = run.with_name(f"{run.name}-reward")
    if not beside.exists():
        raise InputError(
            f"there is no {beside}: train a reward model with `gpt reward {run}`, name one with --reward, or let the "
            "program judge with --reward program"
        )
    return located(str(beside))


def prompt_data(run: "Run", asked: Any) -> "DataConfig":
    """Return the prompts that were asked for, or those that a run was finetuned on, or the built-in ones."""
    from engine.config import DataConfig
    from rlhf.prompts import prompts_of
    from train.data.sources import STORIES_INSTRUCT

    if asked.data is not None:
        return DataConfig(source=located(asked.data), prompt_column=asked.prompt_column)
    if asked.prompt_column is not None:
        raise InputError("--prompt-column names a column of --data")
    return prompts_of(run.read_recipe()) or DataConfig(source=STORIES_INSTRUCT)


@dataclass(frozen=True)
class AnswerOptions(Machine):
    """Which prompts are answered, and how the answers are drawn."""

    data: Prompts = None
    prompt_column: PromptColumn = None
    temperature: Temperature = 1.0
    seed: Seed = 0
    checkpoint: CheckpointName = "latest"


def best_of_n(
    run: RunArgument,
    how: AnswerOptions,
    policies: Annotated[
        list[Path] | None, Argument(help="Aligned runs to measure on the same prompts.", show_default=False)
    ] = None,
    reward: Reward = None,
    n: Annotated[Few, Option("--count", "-n", help="Answers to each prompt.")] = 16,
    prompts: Annotated[int, "at least 2 and at most 1000000", Option(help="How many held-out prompts.")] = 64,
) -> None:
    """Take the one of n answers that the reward likes best: what that is worth, beside runs aligned by training.

    Example: gpt rlhf best-of-n runs/nano-chat runs/nano-chat-ppo runs/nano-chat-dpo

    Scores, KL and their picture are written to best-of-n.json and best-of-n.png in RUN.
    """
    from engine.chat_template import answer_ends
    from engine.disk import require_writable, write_atomically
    from engine.run import Run
    from engine.tokenizer import Tokenizer
    from rlhf.policy_metrics import BEST_OF_N, BEST_OF_N_GOLD, best_of_n, measure_policy, plot_reward_vs_kl
    from rlhf.prompts import encode_prompts, open_prompts
    from rlhf.reward_model import load_frozen, open_rewards
    from rlhf.rollout import roll_out

    base, machine = Run(run), how.choose()
    require_writable(base.path / "best-of-n.json")
    tokenizer, model = Tokenizer.load(base.tokenizer), load_frozen(base, machine, how.checkpoint)
    source, ends = open_prompts(prompt_data(base, how)), answer_ends(tokenizer)
    asked = encode_prompts(source, "validation", tokenizer, model.config.context, prompts).first(prompts)
    rewards = open_rewards(named_reward(run, reward), asked, tokenizer, machine)
    aligned = {}
    for path in policies or []:
        if Tokenizer.load(Run(path).tokenizer).fingerprint != tokenizer.fingerprint:
            raise InputError(f"{path} has another tokenizer than {run}: it did not begin there")
        aligned[path.name] = load_frozen(Run(path), machine, "latest")
    with Console(stderr=True):
        rollout = roll_out(model, asked, ends, each=n, temperature=how.temperature, seed=how.seed)
        curves = {
            name: best_of_n(rollout, n, by, rewards)
            for name, by in {BEST_OF_N: "reward", BEST_OF_N_GOLD: "gold"}.items()
            if by in rewards
        }
        for name, policy in aligned.items():
            answers = roll_out(policy, asked, ends, each=8, temperature=how.temperature, seed=how.seed)
            found = measure_policy(policy, model, answers, rewards, answers=8, temperature=how.temperature)
            curves[name] = [found]
    rows = []
    for name, points in curves.items():
        for point in points:
            label = name.replace("of n", f"of {point['n']}") if "n" in point else name
            scores = (f"{point[each]:.3f} ± {point[f'{each}_error']:.3f}" for each in rewards)
            rows.append([label, *scores, f"{'' if 'kl_error' in point else 'at most '}{point['kl']:.2f}"])
    print_table(("", *rewards, "KL"), rows, **FRAMELESS)
    result, path = {"data": source.name, "prompts": len(asked), "curves": curves}, base.path / "best-of-n.json"
    write_atomically(path, json.dumps(result, indent=1))
    picture = path.with_suffix(".png")
    typer.echo(f"written to {path}" + (f" and {picture}" if plot_reward_vs_kl(curves, picture) else ""))


def pairs(
    run: RunArgument,
    how: AnswerOptions,
    out: Annotated[Path | None, Option(help="The file to write; RUN/pairs.jsonl unless given.")] = None,
    judge: Annotated[str, Option(help="Who scores the answers: `program`, or the run of a reward model.")] = "program",
    prompts: Annotated[Few, Option(help="How many prompts of the training split.")] = 2_000,
    answers: Annotated[
        int, "at least 2 and at most 1000000", Option(help="Answers to each; every two of them make a pair.")
    ] = 2,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Draw answers from a chat model and let a judge, who sometimes errs, say which of two is better.

    Example: gpt rlhf pairs runs/nano-chat, then gpt reward runs/nano-chat --data runs/nano-chat/pairs.jsonl

    Each line has prompt, chosen, rejected, and as gold whether the judge was right.
    """
    from engine.disk import write_atomically
    from engine.run import Run
    from rlhf.preferences import Preference
    from rlhf.prompts import encode_prompts, open_prompts
    from rlhf.reward_model import open_reward
    from rlhf.sampled_pairs import require_sampled, sample_pairs

    base, machine, console = Run(run), how.choose(), Console()
    path = out or base.path / "pairs.jsonl"
    require_free(path, overwrite, require_sampled)
    source = open_prompts(prompt_data(base, how))
    model, tokenizer = base.load_model(machine, how.checkpoint, console.say)
    asked = encode_prompts(source, "train", tokenizer, model.config.context, prompts)
    console.say(f"prompts    {asked.describe()}")
    reward = open_reward(located(judge), tokenizer, machine, asked.facts[0] is not None)
    begin = time.perf_counter()

    with console:
        found = sample_pairs(model, asked, reward, answers=answers, temperature=how.temperature, seed=how.seed)
    console.say(
        f"{len(asked):,} prompts of {source.name}: {found.tokens:,} tokens in {time.perf_counter() - begin:,.0f} s"
    )
    console.say(found.describe())
    if not found.pairs:
        raise InputError("no two answers to a prompt differ: nothing is written")
    write_atomically(path, "".join(map(Preference.to_json_line, found.pairs)))
    console.say(f"written to {path}")
    console.say(f"use it     gpt reward {run} --data {path}")
    console.say(f"           gpt rlhf dpo {run} --data {path}")

"""gpt demo: the whole pipeline, from stories to an aligned chat model, as the commands that a person would type."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import InputError

BRIEF = "stories-instruct:brief"


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the runs and of their report.")] = Path("runs/demo"),
    short: Annotated[bool, typer.Option("--short", help="Two thirds of the time, and less to see.")] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Do it all so many times over; the report says how much varies.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The seed, or the first of --seeds.")] = 0,
    control: Annotated[
        bool,
        typer.Option("--control", help="Also PPO without a price on KL, which takes long: is the true score lost?"),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what is in the folder first.")] = False,
) -> None:
    """Pretrain, finetune, let a noisy judge compare answers, learn a reward, align in three ways, and compare them.

    Example: gpt demo

    Under twelve minutes on two CPU cores, with no network. The report is OUT/report.md.
    """
    import shutil

    from cli.demo_report import read_demo, write_demo_report

    if out.exists() and any(out.iterdir()):
        # Nothing is deleted that is no demo.
        if not overwrite or not (out / "report.md").exists():
            raise InputError(f"{out} is not empty: --out takes another folder, --overwrite replaces a demo")
        shutil.rmtree(out)
    folders = {each: out / f"seed-{each}" if seeds > 1 else out for each in range(seed, seed + seeds)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text("This demo has not come to its end.\n")
    results = []
    for each, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        groups = commands(folder, each, short=short, control=control)
        seconds = {" and ".join(group): run_together(group, folder) for group in groups}
        results.append(read_demo(folder, seconds, each))
    typer.echo("")
    for line in write_demo_report(out, results, folders[seed]):
        typer.echo(line)
    typer.echo(f"\nreport     {out / 'report.md'}\ntalk to it gpt chat {folders[seed] / 'chat-ppo'}")


def commands(out: Path, seed: int, *, short: bool, control: bool) -> list[dict[str, list[str]]]:
    """What is run, in order, by name; those of one group at the same time."""
    share = 0.5 if short else 1.0
    base, chat, reward = out / "base", out / "chat", out / "chat-reward"
    pairs = chat / "pairs.jsonl"
    held_out = "--set data.holdout=0.08"
    # In bf16 a model this small is slower where a CPU has it, and elsewhere the figures would be others.
    quick = f"--precision fp32 --set loop.evaluate_every=1000000 --seed {seed}"

    def rounds(count: int) -> str:
        # Fresh answers teach more than a second look at the same ones. A norm's gain is near 1, a matrix's entries are
        # not: what is a step for them is none for it.
        return f"--rounds {share * count:.0f} --set alignment.passes=1 --set optimizer.norm_rate=3e-3 {quick}"

    # A critic that has seen so few answers knows little: with lam below 1 the first tokens, in which the hero is named,
    # would hear next to nothing of the score.
    # An implicit reward falls for what neither model says, so KL is dear: at a beta of 0.06 gold falls in the end.
    critic = "--set alignment.critic_rounds=2 --set alignment.lam=1"
    ppo = words("rlhf ppo", chat, "--reward", reward, critic)
    aligned = {
        "ppo": [*ppo, *words("--beta 0.35 --rate 3e-4", rounds(32))],
        "grpo": words("rlhf grpo", chat, "--reward", reward, "--beta 0.35 --rate 1.5e-4", rounds(48)),
    }
    if control:
        free = words("--out", out / "chat-ppo-free", "--beta 0 --set alignment.kl_budget=1000 --rate 1e-3", rounds(40))
        aligned["ppo-free"] = [*ppo, *free]
    policies = [out / f"chat-{name}" for name in ("dpo", *aligned)]
    return [
        {"pretrain": words("train nano --out", base, f"--tokens 8e5 --set data.final_evaluation_tokens=50000 {quick}")},
        # In steps twice as large it would not learn in this time to heed what is asked for.
        {"finetune": words("finetune", base, "--out", chat, f"--data {BRIEF} --rate 1 --batch 4 --tokens 6e5 {quick}")},
        {
            "pairs": words(
                "rlhf pairs", chat, f"--prompts {share * 2000:.0f} --answers 4 --seed {seed} --precision fp32"
            )
        },
        {
            # A head on the last hidden state would put 0.75 of the pairs of unseen prompts in gold order, this 0.93.
            "reward": words("reward", chat, "--data", pairs, held_out, "--implicit --rate 1e-4 --batch 8", quick),
            "dpo": words("rlhf dpo", chat, "--data", pairs, held_out, "--beta 0.5 --rate 1e-4 --batch 8", quick),
        },
        aligned,
        {
            "best-of-n": words(
                "rlhf best-of-n", chat, *policies, "--reward", reward, f"--count {16 if short else 64} --precision fp32"
            )
        },
    ]


def words(*parts: str | Path) -> list[str]:
    """The words of a command line; a path is one, whatever is in it."""
    return [word for part in parts for word in ([str(part)] if isinstance(part, Path) else part.split())]


def run_together(group: dict[str, list[str]], out: Path) -> float:
    """Run commands at the same time, each with its share of the cores: small models gain little from more.

    One alone writes to the console, several to files. Returns seconds. Raises InputError where one fails.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // len(group))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    begin, running = time.perf_counter(), {}
    for name, command in group.items():
        typer.echo(f"\n$ gpt {' '.join(command)}" + (f"  > {out / name}.log" if len(group) > 1 else ""))
        log = (out / f"{name}.log").open("w") if len(group) > 1 else None
        running[name] = subprocess.Popen(
            [sys.executable, "-m", "cli", *command], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    for name, process in running.items():
        if process.wait():
            for other in running.values():
                other.terminate()
            raise InputError(f"gpt {' '.join(group[name])} failed; see {out / name}.log")
    return time.perf_counter() - begin

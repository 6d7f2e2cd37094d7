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
    short: Annotated[bool, typer.Option("--short", help="A third of the time, and less to see.")] = False,
    seeds: Annotated[
        int, typer.Option(min=1, help="Do it all so many times over; the report says how much varies.")
    ] = 1,
    control: Annotated[
        bool, typer.Option("--control", help="Also PPO without a price on KL: what becomes of the true score?")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what is in the folder first.")] = False,
) -> None:
    """Pretrain, finetune, let a noisy judge compare answers, learn a reward, align in three ways, and compare them.

    Example: gpt demo

    About a quarter of an hour on two CPU cores, with no network. The report is OUT/report.md.
    """
    import shutil

    from rlhf.demo_report import read_demo, write_demo_report

    if out.exists() and any(out.iterdir()):
        # Nothing is deleted that is no demo.
        if not overwrite or not (out / "report.md").exists():
            raise InputError(f"{out} is not empty: --out takes another folder, --overwrite replaces a finished demo")
        shutil.rmtree(out)
    folders = [out / f"seed-{seed}" for seed in range(seeds)] if seeds > 1 else [out]
    results = []
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        groups = commands(folder, seed, short=short, control=control)
        seconds = {" and ".join(group): run_together(group, folder) for group in groups}
        results.append(read_demo(folder, seconds, seed))
    typer.echo("")
    for line in write_demo_report(out, results, folders[0]):
        typer.echo(line)
    typer.echo(f"\nreport     {out / 'report.md'}\ntalk to it gpt chat {folders[0] / 'chat-ppo'}")


def commands(out: Path, seed: int, *, short: bool, control: bool) -> list[dict[str, list[str]]]:
    """What is run, in order, by name; those of one group at the same time."""
    share = 0.3 if short else 1.0
    chat, pairs, reward = out / "chat", out / "chat" / "pairs.jsonl", out / "chat-reward"
    seeded = ["--seed", str(seed)]
    quick = ["--set", "loop.evaluate_every=1000000"]
    held_out = ["--set", "data.holdout=0.08"]

    def rounds(count: int) -> list[str]:
        return ["--rounds", f"{share * count:.0f}", "--set", "alignment.passes=2", *seeded]

    def tokens(count: float) -> list[str]:
        return ["--tokens", f"{share * count:.0f}", *quick, *seeded]

    aligned: dict[str, list[str | Path]] = {
        "ppo": ["rlhf", "ppo", chat, "--reward", reward, "--beta", "0.05", "--rate", "2.5e-4", *rounds(18)],
        "grpo": ["rlhf", "grpo", chat, "--reward", reward, "--beta", "0.08", "--rate", "1.5e-4", *rounds(24)],
    }
    if control:
        free: list[str | Path] = ["--beta", "0", "--set", "alignment.kl_budget=1000", "--out", out / "chat-ppo-free"]
        aligned["ppo-free"] = ["rlhf", "ppo", chat, "--reward", reward, "--rate", "4e-4", *rounds(48), *free]
    policies = [out / f"chat-{name}" for name in ("dpo", *aligned)]
    groups: list[dict[str, list[str | Path]]] = [
        {"pretrain": ["train", "nano", "--out", out / "base", *tokens(8e5)]},
        {"finetune": ["finetune", out / "base", "--data", BRIEF, "--rate", "1", "--out", chat, *tokens(8e5)]},
        {"pairs": ["rlhf", "pairs", chat, "--prompts", f"{2000 * share:.0f}", "--answers", "4", *seeded]},
        {
            "reward": ["reward", chat, "--data", pairs, *held_out, *quick, *seeded],
            "dpo": ["rlhf", "dpo", chat, "--data", pairs, "--rate", "1e-4", "--beta", "0.1", *held_out, *tokens(4e5)],
        },
        aligned,
        {"best-of-n": ["rlhf", "best-of-n", chat, *policies, "--reward", reward, "-n", "16" if short else "64"]},
    ]
    return [{name: list(map(str, command)) for name, command in group.items()} for group in groups]


def run_together(group: dict[str, list[str]], out: Path) -> float:
    """Run commands at the same time, each with its share of the cores: small models gain little from more.

    One alone writes to the console, several to files. Returns seconds. Raises InputError where one fails.
    """
    threads = max(1, (os.cpu_count() or 1) // len(group))
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

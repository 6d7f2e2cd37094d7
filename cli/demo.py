"""gpt demo: the whole pipeline, from stories to an aligned chat model, as the commands that a person would type."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from cli.console import Console, notice
from cli.options import Few
from engine.config import Seed
from engine.errors import InputError
from engine.folders import LOCK, one_writer

# By this file, and what it says, a folder is known as a demo's.
MARK, MARKED = "demo.txt", "This folder was made by gpt demo, and gpt demo --overwrite may delete it.\n"
BRIEF, CHAT = "stories-instruct:brief", "stories-instruct:chat"


def demo(
    out: Annotated[Path, Option(help="Folder of the runs and of their report.")] = Path("runs/demo"),
    short: Annotated[bool, Option("--short", help="Two thirds of the time, and less to see.")] = False,
    seeds: Annotated[Few, Option(help="Do it all this many times; the report says how much varies.")] = 1,
    seed: Annotated[Seed, Option(help="The seed, or the first of --seeds.")] = 0,
    control: Annotated[
        bool, Option("--control", help="Also PPO without a price on KL, which takes long: is the true score lost?")
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Delete what is in the folder first.")] = False,
) -> None:
    """Pretrain, finetune, let a noisy judge compare answers, learn a reward, align in three ways, and compare them.

    Example: gpt demo

    Under twelve minutes on two CPU cores, with no network. The report is OUT/report.md.
    """
    from cli.demo_report import read_demo, write_demo_report
    from engine.run import RUN_FILES

    run = rf"(base|first|chat(-(reward|dpo|ppo|grpo|ppo-free))?)/({RUN_FILES.pattern})"
    files = rf"(seed-\d+/)?({run}|(reward|dpo|ppo|grpo|ppo-free)\.log|(\.writing-)?result\.json)"
    files = rf"{re.escape(LOCK)}|{files}|report\.md|frontier\.png|{re.escape(MARK)}"

    def is_demo(*_: object) -> bool:
        return (out / MARK).is_file() and (out / MARK).read_text(errors="replace") == MARKED

    with one_writer(out, re.compile(files), keep=is_demo, say=notice) as held:
        if held.before:
            # Only a demo is deleted.
            if not (overwrite and is_demo()):
                raise InputError(f"{out} is not empty: --out takes another folder, --overwrite replaces a demo")
            held.replace("the demo", notice)
        folders = {each: out / f"seed-{each}" if seeds > 1 else out for each in range(seed, seed + seeds)}
        (out / MARK).write_text(MARKED)
        shutil.rmtree(held.replaced, ignore_errors=True)
        (out / "report.md").write_text("This demo has not come to its end.\n")
        results = []
        for each, folder in folders.items():
            folder.mkdir(parents=True, exist_ok=True)
            groups = commands(folder, each, short=short, control=control)
            seconds = {" and ".join(group): run_together(group, folder) for group in groups}
            results.append(read_demo(folder, seconds, each))
        typer.echo("")
        for line in write_demo_report(out, results):
            typer.echo(line)
        typer.echo(f"\nreport     {out / 'report.md'}\ntalk to it gpt chat {folders[seed] / 'chat-ppo'}")


def commands(out: Path, seed: int, *, short: bool, control: bool) -> list[dict[str, list[str]]]:
    """Return the commands by name, in groups that follow each other; those of a group run at the same time."""
    share = 0.5 if short else 1.0
    base, first, chat, reward = (out / name for name in ("base", "first", "chat", "chat-reward"))
    pairs = chat / "pairs.jsonl"
    held_out = "--set data.holdout=0.08"
    # A model this small is slower in bf16, and its figures would depend on whether a CPU has bf16.
    quick = f"--precision fp32 --set loop.evaluate_every=1000000 --seed {seed}"

    # With twice the batch, it would not learn in this time to do what is asked for.
    few_rows = f"--batch 4 {quick}"

    def rounds(count: int) -> str:
        # Fresh answers teach more than a second pass over the same ones. The gains of norms are near 1, and so need
        # larger steps than the entries of matrices.
        return f"--rounds {share * count:.0f} --set alignment.passes=1 --set optimizer.norm_rate=3e-3 {quick}"

    # The critic sees few answers and knows little. With lam below 1 it would keep the score from reaching the first
    # tokens, which name the hero. Implicit rewards are wrong far from both models: at a beta of 0.06 gold falls.
    critic = "--set alignment.critic_rounds=2 --set alignment.lam=1"
    ppo = words("rlhf ppo", chat, "--reward", reward, critic)
    aligned = {
        "ppo": [*ppo, *words("--beta 0.35 --rate 3e-4", rounds(28))],
        "grpo": words("rlhf grpo", chat, "--reward", reward, "--beta 0.35 --rate 1.5e-4", rounds(40)),
    }
    if control:
        free = words("--out", out / "chat-ppo-free", "--beta 0 --set alignment.kl_budget=1000 --rate 1e-3", rounds(40))
        aligned["ppo-free"] = [*ppo, *free]
    policies = [out / f"chat-{name}" for name in ("dpo", *aligned)]
    return [
        {"pretrain": words("train nano --out", base, f"--tokens 8e5 --set data.final_evaluation_tokens=50000 {quick}")},
        {"finetune": words("finetune", base, "--out", first, f"--data {BRIEF} --rate 1 --tokens 4e5", few_rows)},
        # Conversations alone teach late what a hero is to be like; half of all tokens, and later answers stay behind.
        {"go on": words("finetune", first, "--out", chat, f"--data {CHAT} --rate 1 --tokens 8e5", few_rows)},
        {
            "pairs": words(
                "rlhf pairs", chat, f"--prompts {share * 1000:.0f} --answers 4 --seed {seed} --precision fp32"
            )
        },
        {
            # This puts 0.93 of the pairs of unseen prompts in gold order; a head on the last hidden state 0.75.
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
    """Split the words of a command line. A path is one word, whatever is in it."""
    return [word for part in parts for word in ([str(part)] if isinstance(part, Path) else part.split())]


def run_together(group: dict[str, list[str]], out: Path) -> float:
    """Run commands at the same time, each with its share of the cores: small models gain little from more.

    One alone writes to the console, several to files. Returns seconds. Raises InputError where one fails. A signal
    that asks for a stop is passed on, and waited for: what trains saves.
    """
    from engine.processes import heeded_signals

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // len(group))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if len(group) > 1:
        # A thread that waits for the next product leaves its core to the others; alone, it would only fall asleep.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    begin = time.perf_counter()
    running: dict[str, subprocess.Popen[bytes]] = {}
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        # One that asks kindly twice means it. A terminal that is closed may do so by itself.
        if not stopped or number in (signal.SIGINT, signal.SIGTERM):
            stopped.append(number)
            for process in running.values():
                process.terminate()

    before = {number: signal.signal(number, stop) for number in heeded_signals()}
    try:
        for name, command in group.items():
            typer.echo(f"\n$ gpt {' '.join(command)}" + (f"  > {out / name}.log" if len(group) > 1 else ""))
            log = (out / f"{name}.log").open("w") if len(group) > 1 else None
            running[name] = subprocess.Popen(
                [sys.executable, "-m", "cli", *command], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        for name, process in running.items():
            if process.wait() and not stopped:
                for other in running.values():
                    other.terminate()
                    other.wait()
                raise InputError(f"gpt {' '.join(group[name])} failed; see {out / name}.log")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        Console().say(f"the demo is stopped; what its commands have saved is in {out}")
        raise typer.Exit(128 + stopped[0])
    return time.perf_counter() - begin

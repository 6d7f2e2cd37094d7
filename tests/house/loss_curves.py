"""Does a change leave training as it was, to the bit? Short runs of every stage, compared number by number.

Run it from the root of the tree as it was, and again from the root of the tree as it is now:

    python tests/house/loss_curves.py --write before.json
    python tests/house/loss_curves.py --against before.json

Every logged number is compared exactly, times apart, and so is every byte of the weights. A few minutes on two cores.
Two machines do not add up in the same order: both runs have to be made on one. Runs can be named: `... nano dpo`; those
that they begin with are run as well.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What a clock says differs from one time to the next.
TIMES = ("seconds", "seconds_left", "tokens_per_second", "mfu", "process_tokens_per_second", "straggling", "memory")
SMALL = (
    "--precision fp32 --seed 3 --set loop.batch=8 --set loop.evaluate_every=4 --set data.final_evaluation_tokens=4000"
)
PRETRAIN = f"train nano {SMALL} --set data.documents=1500 --set model.vocab_size=1024"
ROUNDS = "--rounds 2 --set alignment.answers=16 --set alignment.max_tokens=40 --precision fp32 --seed 3 --batch 8"

# For each run: the run that it begins with (or None), and its commands, one after the other.
RUNS: dict[str, tuple[str | None, list[str]]] = {
    "nano": (None, [f"{PRETRAIN} --steps 24 --out nano"]),
    "resumed": (None, [f"{PRETRAIN} --steps 6 --out resumed", "train nano --out resumed --resume --steps 12"]),
    "streamed": (None, [f"{PRETRAIN} --steps 6 --stream --out streamed"]),
    "two-processes": (None, [f"{PRETRAIN} --steps 6 --gpus 2 --device cpu --out two-processes"]),
    "two-shards": (None, [f"{PRETRAIN} --steps 6 --gpus 2 --shard --device cpu --out two-shards"]),
    "finetune": ("nano", [f"finetune nano {SMALL} --set data.documents=400 --steps 12 --out finetune"]),
    "reward": ("finetune", [f"reward finetune {SMALL} --set data.documents=200 --steps 6 --out reward"]),
    "implicit": ("finetune", [f"reward finetune {SMALL} --implicit --set data.documents=200 --steps 6 --out implicit"]),
    "ppo": ("reward", [f"rlhf ppo finetune --reward reward {ROUNDS} --out ppo"]),
    "grpo": ("reward", [f"rlhf grpo finetune --reward reward --set alignment.group=4 {ROUNDS} --out grpo"]),
    "dpo": ("finetune", [f"rlhf dpo finetune {SMALL} --set data.documents=200 --steps 6 --out dpo"]),
    "ipo": ("finetune", [f"rlhf dpo finetune --ipo {SMALL} --set data.documents=200 --steps 6 --out ipo"]),
}


def needed(names: list[str]) -> list[str]:
    """The named runs and those that they begin with, in an order in which they can be made."""
    found: set[str] = set()
    for name in names:
        each: str | None = name
        while each is not None:
            found.add(each)
            each = RUNS[each][0]
    return [name for name in RUNS if name in found]


def record(folder: Path) -> dict[str, Any]:
    """Every number that a finished run logged, times apart, and the SHA-256 of its newest weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoint = max((folder / "checkpoints").glob("step-*"))
    weights = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    metrics = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    return {"metrics": metrics, "weights": weights}


def make_runs(names: list[str]) -> dict[str, Any]:
    root = Path.cwd()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(root)}
    curves = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in needed(names):
            for command in RUNS[name][1]:
                print(f"{name}: gpt {command}", file=sys.stderr, flush=True)
                words = [sys.executable, "-m", "cli", *command.split()]
                done = subprocess.run(words, cwd=scratch, env=environment, capture_output=True, text=True)
                if done.returncode != 0:
                    sys.exit(f"{name} failed with code {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
            curves[name] = record(Path(scratch, name))
    return curves


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for name, curve in now.items():
        for line, (old, new) in enumerate(zip(before[name]["metrics"], curve["metrics"], strict=False), 1):
            # NaN is not equal to itself, but its spelling is.
            changed = [key for key in old.keys() | new.keys() if repr(old.get(key)) != repr(new.get(key))]
            found += [f"{name}, line {line}, {key}: {old.get(key)} became {new.get(key)}" for key in sorted(changed)]
        if len(before[name]["metrics"]) != len(curve["metrics"]):
            found.append(f"{name}: {len(before[name]['metrics'])} lines became {len(curve['metrics'])}")
        if before[name]["weights"] != curve["weights"]:
            found.append(f"{name}: the weights differ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)}; all unless given")
    parser.add_argument("--write", type=Path, help="a file for what the runs logged")
    parser.add_argument("--against", type=Path, help="such a file, to compare with")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.runs if name not in RUNS]:
        parser.error(f"there is no {unknown[0]}; it is one of {', '.join(RUNS)}")
    curves = make_runs(arguments.runs or list(RUNS))
    if arguments.write:
        arguments.write.write_text(json.dumps(curves, indent=1))
    if arguments.against:
        found = differences(json.loads(arguments.against.read_text()), curves)
        for line in found:
            print(line)
        if found:
            sys.exit(1)
        print(f"identical: {', '.join(curves)}")


if __name__ == "__main__":
    main()

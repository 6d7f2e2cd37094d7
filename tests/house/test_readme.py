"""Every command of the top README does what it says there, made small enough for a test."""

import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli.main import app
from tests.cli.conftest import Gpt
from tests.cli.pretrained import pretrained
from tests.train.data.hub import Hub

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# What makes a command small; the last of two equal options counts. One that is not here runs as it stands.
SMALL_MODEL = "--set model.width=32 --set model.blocks=2 --set model.vocab_size=512 --set loop.samples=1 --device cpu"
SMALL_DATA = "--set data.documents=300 --set data.final_evaluation_tokens=2000"
SMALL_ROUNDS = "--rounds 1 --set alignment.answers=8 --set alignment.max_tokens=8 --batch 8"
# The program finds no story of so small a model better than another: a reward model has to.
BEFORE = {"gpt rlhf pairs": f"gpt reward runs/nano-chat --out runs/judge --steps 1 --batch 2 {SMALL_DATA}"}
SMALLER = {
    "gpt finetune runs/smollm2": f"--steps 1 --set loop.batch=2 --set model.context=128 {SMALL_DATA}",
    "gpt train nano": f"{SMALL_MODEL} {SMALL_DATA}",
    "gpt train tiny": f"--data stories --steps 1 --set loop.batch=2 {SMALL_MODEL} {SMALL_DATA}",
    "gpt train large": f"--data stories --steps 1 --set loop.batch=2 --gpus 1 --overwrite {SMALL_MODEL} {SMALL_DATA}",
    "gpt generate": "--max-tokens 8",
    # Long enough that answers end, so that they are pairs.
    "gpt finetune": f"--data stories-instruct:brief --steps 30 --set loop.batch=4 {SMALL_DATA}",
    "gpt evaluate": "--tokens 500 --count 4",
    "gpt rlhf pairs": "--prompts 40 --answers 4 --judge runs/judge",
    "gpt reward": "--steps 1 --batch 2",
    "gpt rlhf ppo": SMALL_ROUNDS,
    "gpt rlhf dpo": "--steps 1 --batch 2",
    "gpt rlhf best-of-n": "--count 2 --prompts 4",
    "gpt bench-attention": "--help",
}


def commands() -> list[str]:
    lines = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
    return [re.split(r"\s#\s", line)[0].strip() for line in lines]


def test_every_block_says_what_it_is() -> None:
    assert {language for language, _ in BLOCKS} <= {"sh", "python", "text"}
    assert README.count("```") == 2 * len(BLOCKS)


def test_the_table_names_every_command_with_its_own_phrase() -> None:
    told = dict(re.findall(r"^\|.*\| `gpt ([\w -]+)` \| (.+?) \|$", README, re.MULTILINE))
    found = dict(leaves(typer.main.get_command(app)))
    assert told == found


def leaves(command: Any, words: str = "") -> Iterator[tuple[str, str]]:
    for name, each in command.commands.items():
        if hasattr(each, "commands"):
            yield from leaves(each, f"{words}{name} ")
        else:
            yield f"{words}{name}", each.get_short_help_str(200).rstrip(".")


def publish(hub: Hub) -> None:
    """Let the Hub have what README fetches from it: a small model of that name, and few rows."""
    pretrained("llama", Path("smollm2"))
    files = {path.name: path.read_bytes() for path in Path("smollm2").iterdir()}
    hub.publish("HuggingFaceTB/SmolLM2-135M-Instruct", files)
    rows = [{"instruction": f"say {n}", "context": "", "response": f"{n}!"} for n in range(60)]
    hub.rows("databricks/databricks-dolly-15k", train=rows)
    turns = [[{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}!"}] for n in range(60)]
    pairs = [{"chosen": turn, "rejected": [turn[0], {"role": "assistant", "content": "no"}]} for turn in turns]
    hub.rows("HuggingFaceH4/ultrafeedback_binarized", train_prefs=pairs, test_prefs=pairs[:4])


def test_every_command_of_the_readme_runs(gpt: Gpt, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other in one folder, as a reader would type them."""
    pytest.importorskip("transformers")
    publish(hub)
    makefile = (ROOT / "Makefile").read_text()
    ran = []

    def run(command: str) -> None:
        # Several machines cannot meet on one: here the same line runs on this one alone.
        command = re.sub(r" --nodes \S+ --rendezvous \S+", "", command)
        # How many steps a time allows differs from machine to machine, and so would what the model writes.
        command = re.sub(r"--minutes \S+", "--steps 4", command)
        more = next((options for start, options in SMALLER.items() if command.startswith(start)), "")
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        done = gpt(*shlex.split(f"{command} {more}")[1:])
        # `gpt doctor` ends with 1 where something needed is broken, which a test's machine may have.
        assert done.code in ((0, 1) if command == "gpt doctor" else (0,)), f"{command}\n{done.out}{done.err}"
        ran.append(command)

    for command in commands():
        program, *rest = command.split()
        if program == "make":
            # This very test runs under one of them.
            assert f"\n{rest[0]}:" in makefile
        elif program == "gpt" and rest[0] == "serve":
            serve_and_ask(command)
        elif program == "gpt":
            for earlier in [before for start, before in BEFORE.items() if command.startswith(start)]:
                run(earlier)
            run(command)
        else:
            assert command == "source .venv/bin/activate"
    assert len(ran) > 10


def serve_and_ask(command: str) -> None:
    """Start the server, and run the README's Python against it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "cli", *command.split()[1:], "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert any(f":{port}" in line for line in server.stdout)
        (example,) = [text for language, text in BLOCKS if language == "python"]
        example = example.replace("nano-chat", command.rpartition("/")[2])
        asked = [sys.executable, "-c", example.replace(":8000", f":{port}")]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)


def test_what_was_tried_with_other_tools_is_told_with_the_versions_that_were_tried() -> None:
    tried = json.loads((ROOT / "bench/results/compatibility.json").read_text())
    assert {each["version"] for each in tried.values() if each["version"] not in README} == set()


@pytest.mark.parametrize(
    "room", ["cli", "cli/server", "cli/watching", "engine", "train", "train/data", "rlhf", "bench"]
)
def test_the_readme_of_a_room_names_its_files(room: str) -> None:
    told = (ROOT / room / "README.md").read_text()
    files = [path.name for path in (ROOT / room).glob("*.py") if not path.name.startswith("__")]
    assert [name for name in files if name not in told] == []


def test_every_link_to_a_file_of_the_project_leads_there() -> None:
    names = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for page in map(ROOT.joinpath, names.split()):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"

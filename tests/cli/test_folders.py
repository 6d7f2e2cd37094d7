"""What commands do to the folders that they write: they refuse, they replace what is theirs, they leave no half."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InputError
from tests.cli.conftest import SMALL, Gpt
from tests.engine.test_folders import ROOT, holder
from train import trainer
from train.data import shards
from train.loop import Loop

ROOTED = {**os.environ, "PYTHONPATH": str(ROOT)}

SHORT = "A little story.\n"
LONG = "<|endoftext|>\n".join(f"A little story, number {n}.\n" for n in range(300))
TRAIN = ("train", "nano", "--data", "words.txt", "--steps", "1", "--out", "runs/a", *SMALL)
PREPARE = ("data", "prepare", "words.txt", "--out", "ready", "--vocab-size", "300")


def contents(folder: str | Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# Texts that are refused at different places: no text, no validation split, too few tokens for a batch.
REFUSED = {"empty": "", "one": SHORT, "few": "<|endoftext|>\n".join([SHORT, "Another story.\n"])}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_after_a_text_that_is_refused_the_mended_one_just_works(gpt: Gpt, text: str) -> None:
    Path("words.txt").write_text(text)
    few = ("--set", "loop.batch=8")
    refused = gpt(*TRAIN, *few)
    assert refused.code == 2 and not Path("runs").exists(), refused.err
    if text != REFUSED["few"]:
        assert gpt(*PREPARE).code == 2 and not Path("ready").exists()
    Path("words.txt").write_text(LONG)
    done = gpt(*TRAIN, *few)
    assert done.code == 0, done.err
    done = gpt(*PREPARE)
    assert done.code == 0, done.err


def test_after_documents_that_are_refused_the_mended_ones_are_finetuned_on(gpt: Gpt, trained: Path) -> None:
    command = ("finetune", str(trained), "--data", "words.txt", "--steps", "1", "--out", "runs/b")
    for text in REFUSED.values():
        Path("words.txt").write_text(text)
        assert gpt(*command, "--batch", "64").code == 2 and not Path("runs/b").exists()
    Path("words.txt").write_text(LONG)
    assert gpt(*PREPARE).code == 0
    refused = gpt(*("ready" if word == "words.txt" else word for word in command))
    assert "ready has another tokenizer than" in refused.err and not Path("runs/b").exists()
    assert gpt(*command, "--batch", "64").code == 0


def test_a_run_that_was_to_be_replaced_is_there_again_after_a_failure(gpt: Gpt, trained: Path) -> None:
    before = contents(trained)
    Path("words.txt").write_text(SHORT)
    command = (*TRAIN[: -len(SMALL) - 1], str(trained), *SMALL, "--overwrite")
    refused = gpt(*command)
    assert refused.code == 2 and "1 text" not in refused.err and contents(trained) == before
    Path("words.txt").write_text(LONG)
    done = gpt(*command)
    assert done.code == 0 and f"deleting the run in {trained.absolute()}: {len(before)} files" in done.err
    assert not (trained / "checkpoints/step-00000002").exists() and not list(Path("runs").rglob(".gpt-*"))


def test_a_failure_between_preparation_and_training_leaves_nothing(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(trainer, "Loop", fail)
    failed = gpt("train", "nano", "--stream", "--steps", "1", "--out", "runs/a", *SMALL)
    assert failed.code == 1 and "RuntimeError: broken" in failed.err
    # What is tokenized is of use to the same command.
    assert Path("runs/a/data/validation/index.json").exists()


@pytest.mark.parametrize("name", ["thesis.md", "data/thesis.md", "checkpoints/step-00000002/notes", "chat/config.json"])
def test_overwrite_names_what_is_no_part_of_a_run_and_deletes_nothing(gpt: Gpt, trained: Path, name: str) -> None:
    (trained / name).parent.mkdir(exist_ok=True)
    (trained / name).write_text("mine")
    before = contents(trained)
    refused = gpt("train", "nano", "--steps", "1", "--out", str(trained), "--overwrite", *SMALL)
    assert refused.code == 2 and f"{name} is no part of the run" in refused.err and contents(trained) == before


def test_everything_that_commands_write_into_a_run_may_be_replaced(gpt: Gpt, chat: str) -> None:
    run = Path(chat)
    for command in (
        ("evaluate", chat, "--count", "2"),
        ("rlhf", "pairs", chat, "--prompts", "2", "--data", "chats.jsonl"),
    ):
        gpt(*command)
    for name in (
        *("answers.json", "best-of-n.json", "best-of-n.png", "wandb-id", "wandb/run-1/files/a", "pairs.jsonl"),
        *(".writing-report.md", ".gpt-lock", "checkpoints/.writing-step-00000003/model.safetensors"),
        *("checkpoints/damaged-step-00000001/optimizer-00001-of-00002.safetensors", "data/train/00000.tokens.tmp"),
        *("checkpoints/step-00000009/critic.safetensors", "data/validation/unfinished.json", "tokenizer.json"),
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    (run / "tokenizer.json").unlink()
    (run / "wandb/latest-run").symlink_to("run-1")
    tune = ("finetune", "runs/small", "--data", "chats.jsonl", "--steps", "1", "--batch", "2", "--overwrite")
    done = gpt(*tune)
    assert done.code == 0, done.err
    assert not (run / "wandb-id").exists()


@pytest.mark.parametrize("mark", [None, "mine"])
def test_a_folder_with_a_report_is_no_demo(gpt: Gpt, mark: str | None) -> None:
    Path("thesis").mkdir()
    Path("thesis/report.md").write_text("my thesis")
    if mark:
        Path("thesis/demo.txt").write_text(mark)
    before = contents("thesis")
    refused = gpt("demo", "--out", "thesis", "--overwrite")
    assert refused.code == 2 and "thesis is not empty" in refused.err and contents("thesis") == before


@pytest.fixture
def demo(gpt: Gpt, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a demo leaves behind whose first command has made a run, and whose second has failed."""

    def run_together(group: dict[str, list[str]], out: Path) -> float:
        if "pretrain" not in group:
            (out / "reward.log").write_text("failed")
            raise RuntimeError("failed")
        shutil.copytree(trained, out / "base")
        return 0.0

    monkeypatch.setattr("cli.demo.run_together", run_together)
    assert gpt("demo", "--out", "demo").code == 1
    return Path("demo")


def test_only_a_demo_is_replaced_and_only_where_nothing_else_is_in_it(gpt: Gpt, demo: Path) -> None:
    assert (demo / "base/config.json").exists() and (demo / "reward.log").exists()
    assert gpt("demo", "--out", "demo").code == 2
    for name in ("thesis.md", "base-chat/config.json", "chat-mine/config.json", "base/notes.txt", "mine.log"):
        (demo / name).parent.mkdir(exist_ok=True)
        (demo / name).write_text("mine")
        before = contents(demo)
        refused = gpt("demo", "--out", "demo", "--overwrite")
        assert refused.code == 2 and name in refused.err and contents(demo) == before
        (demo / name).unlink()
    assert gpt("demo", "--out", "demo", "--overwrite").code == 1
    assert not list(demo.rglob(".gpt-*")) and (demo / "base/config.json").exists()


def test_an_export_or_import_that_fails_leaves_nothing(
    gpt: Gpt, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    pytest.importorskip("tokenizers")
    assert gpt("export", str(trained), "--out", "hf").code == 0
    commands = (
        ("safetensors.torch.save_file", ("export", str(trained), "--out", "new/a")),
        ("engine.checkpoint.save", ("import", "hf", "--out", "new/b")),
    )
    for broken, command in commands:
        with monkeypatch.context() as patch:
            patch.setattr(broken, fail)
            assert gpt(*command).code != 0 and not Path("new").exists()
    assert all(gpt(*command).code == 0 for _, command in commands)


def test_a_tokenizer_and_pairs_replace_only_their_like(gpt: Gpt, chat: str) -> None:
    Path("words.txt").write_text(LONG)
    learn = ("tokenizer", "train", "--data", "words.txt", "--vocab-size", "300", "--out", "out")
    ask = ("rlhf", "pairs", chat, "--data", "chats.jsonl", "--out", "out")
    row = {"prompt": "say", "chosen": "yes", "rejected": "no"}
    for text in ("my thesis", "", json.dumps(row) + "\n", json.dumps({**row, "gold": True}, indent=1)):
        Path("out").write_text(text)
        for command in (learn, ask) if text else (learn,):
            assert "--overwrite replaces it" in gpt(*command).err
            refused = gpt(*command, "--overwrite")
            assert refused.code == 2 and "out is left alone" in refused.err and Path("out").read_text() == text
    Path("out").unlink()
    assert gpt(*learn).code == 0 and gpt(*learn).code == 2 and gpt(*learn, "--overwrite").code == 0


def test_a_folder_that_is_being_written_is_refused_before_anything_is_touched(gpt: Gpt, trained: Path) -> None:
    Path("words.txt").write_text(LONG)
    resume = ("train", "--out", str(trained), "--resume", "--steps", "3")
    with holder(trained) as process:
        before = contents(trained)
        for command in (
            ("train", "nano", "--out", str(trained)),
            ("train", "nano", "--out", str(trained), "--overwrite"),
            resume,
            ("finetune", str(trained), "--data", "words.txt", "--out", str(trained.absolute()) + "/../small"),
            (*PREPARE[:4], str(trained), *PREPARE[5:]),
            ("demo", "--out", str(trained), "--overwrite"),
            ("export", str(trained), "--out", str(trained)),
            ("import", str(trained), "--out", str(trained)),
        ):
            refused = gpt(*command)
            what = f"is being written by process {process.pid} on " if "finetune" not in command else "own folder"
            assert refused.code == 2 and what in refused.err, command
            assert contents(trained) == before
        # Whoever reads, or writes what is measured, is free.
        for reader in ("info", "generate --max-tokens 2", "evaluate --count 0 --tokens 100"):
            name, *how = reader.split()
            assert gpt(name, str(trained), *how).code == 0
        process.kill()
    assert gpt(*resume).code == 0


def test_commands_write_a_folder_alone(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held from before the first file of a new folder until the last; and by the process that was asked."""
    script = "import re, sys; from pathlib import Path; from engine.folders import one_writer\n"
    script += "with one_writer(Path(sys.argv[1]), re.compile('')): pass"
    found: list[str] = []

    def look(folder: str) -> None:
        asked = subprocess.run([sys.executable, "-c", script, folder], env=ROOTED, stderr=-1, text=True)
        found.append(asked.stderr)

    monkeypatch.setattr(Loop, "on_step", lambda self, step: look("runs/a"))
    honest = shards._write_shards

    def write_shards(place: Path, *rest: Any) -> None:
        look("ready" if place.parts[0] == "ready" else "runs/a")
        honest(place, *rest)

    monkeypatch.setattr(shards, "_write_shards", write_shards)
    Path("words.txt").write_text(LONG)
    assert gpt(*TRAIN).code == 0 and gpt(*PREPARE).code == 0
    assert len(found) == 5 and all(f"process {os.getpid()} on " in each for each in found), found


def test_what_a_killed_export_has_left_is_replaced_and_a_whole_one_is_not(gpt: Gpt, trained: Path) -> None:
    out = Path("out")
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / ".gpt-lock").write_text("process 1 on elsewhere (gpt export runs/small --out out)")
    assert gpt("export", str(trained), "--out", "out").code == 0 and (out / "model.safetensors").exists()
    before = contents(out)
    (out / ".gpt-lock").write_text("process 1 on elsewhere (gpt train nano --out out)")
    refused = gpt("export", str(trained), "--out", "out")
    assert refused.code == 2 and "not an empty folder" in refused.err and contents(out) == before


def test_a_run_that_ends_before_its_first_checkpoint_by_what_it_reads_leaves_nothing(
    gpt: Gpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("the data has no text to train on")

    monkeypatch.setattr(trainer.Loop, "train", fail)
    failed = gpt("train", "nano", "--steps", "1", "--out", "runs/a", *SMALL)
    assert failed.code == 2 and "no text" in failed.err and not Path("runs").exists()

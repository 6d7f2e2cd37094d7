"""`gpt finetune` as a person types it: from a small run to one that `gpt chat` talks with."""

import io
import json
import sys
from pathlib import Path

import pytest

from engine.run import Run
from tests.cli.conftest import SMALL, Gpt

TUNE = ("--steps", "2", "--batch", "2", "--set", "loop.samples=1")


@pytest.fixture
def base(gpt: Gpt) -> str:
    """A run with room for short conversations."""
    small = [*SMALL, "--set", "model.context=160"]
    small += ["--set", "model.vocab_size=2000", "--set", "data.documents=300"]
    assert gpt("train", "nano", "--steps", "1", "--out", "runs/small", *small).code == 0
    return "runs/small"


@pytest.fixture
def chats() -> str:
    """Conversations of so few tokens that they fit."""
    rows = [{"ask": f"say {n}", "reply": f"{n}!"} for n in range(300)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "chats.jsonl"


def test_a_finetuned_run_chats(gpt: Gpt, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = gpt("finetune", base, "--set", "data.documents=80", *TUNE)
    assert tuned.code == 0, tuned.err
    assert "runs/small is finetuned into runs/small-chat" in tuned.out
    assert "left out, longer than the context" in tuned.out and "gpt chat runs/small-chat" in tuned.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Tell me a story.\n"), encoding="utf-8"))
    said = gpt("chat", "runs/small-chat", "--max-tokens", "5")
    assert said.code == 0 and "base model" not in said.err
    recipe = json.loads(Path("runs/small-chat/config.json").read_text())["recipe"]
    assert (recipe["base"], recipe["base_step"]) == ("../small", 1)
    assert Run(Path("runs/small-chat")).read_recipe().base == str(Path(base).resolve())
    told = gpt("info", "runs/small-chat").out
    assert "stories-instruct" in told and "base" in told


def test_resume_overwrite_and_the_columns(gpt: Gpt, base: str, chats: str) -> None:
    data = ("--data", chats, "--prompt-column", "ask", "--response-column", "reply")
    unnamed = gpt("finetune", base, "--data", chats, *TUNE)
    assert unnamed.code == 2 and "which column is the text? There are ask, reply" in unnamed.err
    assert gpt("finetune", base, *data, *TUNE).code == 0
    refused = gpt("finetune", base, *data, *TUNE)
    assert refused.code == 2 and "--resume" in refused.err
    own = ("--seed", "0", "--checkpoint", "1")
    for change in (("--rate", "1"), ("--seed", "1"), ("--checkpoint", "2"), ("--data", base)):
        changed = gpt("finetune", base, "--resume", *change)
        assert changed.code == 2 and "own recipe" in changed.err
    resumed = gpt("finetune", base, *data, *TUNE, *own, "--resume", "--steps", "3")
    assert resumed.code == 0 and "after step 2" in resumed.out, resumed.err
    pretraining = gpt("train", "nano", "--out", "runs/small-chat", "--resume")
    assert pretraining.code == 2 and "gpt finetune" in pretraining.err
    assert gpt("finetune", base, *data, *TUNE, "--overwrite").code == 0


def test_a_moved_project_goes_on_from_any_folder(
    gpt: Gpt, base: str, chats: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    columns = ("--prompt-column", "ask", "--response-column", "reply")
    assert gpt("finetune", base, "--data", "chat*.jsonl", *columns, *TUNE).code == 0
    Path("project").mkdir()
    for name in ("runs", chats):
        Path(name).rename(f"project/{name}")
    monkeypatch.chdir("project/runs/small-chat")
    resumed = gpt("finetune", "../small", "--out", ".", "--resume", "--steps", "3")
    assert resumed.code == 0 and "after step 2" in resumed.out, resumed.err
    assert Run(Path()).read_recipe().base == str(tmp_path / "project" / "runs" / "small")


def test_documents_make_no_chat_model(gpt: Gpt, base: str) -> None:
    Path("play.txt").write_text("Speak, owl, speak! The night is long.\n\n" * 300)
    tuned = gpt("finetune", base, "--data", "play.txt", *TUNE)
    assert tuned.code == 0 and "is finetuned into runs/small-tuned" in tuned.out and "gpt generate" in tuned.out


def test_mistakes_are_named_and_leave_the_base_alone(gpt: Gpt, base: str, chats: str) -> None:
    for arguments, expected in (
        (("runs/none",), "runs/none is not a run"),
        ((base, "--data", "nothing"), "no data is called 'nothing'"),
        ((base, "--prompt-column", "ask", "--data", chats), "name --prompt-column and --response-column together"),
        ((base, "--out", base, "--overwrite"), "cannot become a finetuned run in its own folder"),
        ((base, "--checkpoint", "7"), "has no checkpoint '7'"),
        ((base, "--set", "model.blocks=3", *TUNE), "of another model"),
        ((base, "--steps", "1", "--epochs", "2"), "exactly one of"),
        ((base, "--set", "model.scalar_head=true"), "gpt reward"),
    ):
        refused = gpt("finetune", *arguments)
        assert refused.code == 2 and expected in refused.err, refused
    assert gpt("info", base).code == 0
    assert [path.name for path in Path("runs").iterdir() if (path / "config.json").exists()] == ["small"]

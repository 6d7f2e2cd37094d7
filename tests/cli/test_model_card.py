"""The card of an exported model: what the run tells, in the form that huggingface_hub and the Hub read."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cli.model_card import model_card
from engine import checkpoint
from engine.config import IMPORTED, BudgetConfig, DataConfig, ModelConfig, Recipe
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.tokenizer import Tokenizer

huggingface_hub: Any = pytest.importorskip("huggingface_hub")

LOSSES = ({"step": 2, "loss": 3.0, "tokens": 1024}, {"step": 2, "tokens": 1024, "validation_loss": 2.5})
LATER = ({"step": 4, "loss": 2.0, "tokens": 2048}, {"step": 4, "tokens": 2048, "validation_loss": 1.5})


@pytest.fixture
def runs(tokenizer: Tokenizer, small_config: ModelConfig, tmp_path: Path) -> tuple[Run, Run]:
    """A model of TinyStories, and one finetuned from its second step on somebody's own file."""
    base, chat = Run(tmp_path / "base"), Run(tmp_path / "chat")
    recipe = Recipe(
        name="small", model=small_config, data=DataConfig(source="tinystories"), budget=BudgetConfig(steps=1)
    )
    private = DataConfig(source=str(tmp_path / "private" / "chats.jsonl"))
    tuned = dataclasses.replace(recipe, chat=True, base=str(base.path), base_step=2, data=private)
    for run, its_recipe in ((base, recipe), (chat, tuned)):
        run.write_recipe(its_recipe)
        tokenizer.save(run.path / tokenizer.file_name)
        for step in (2, 4):
            checkpoint.save(run.checkpoints, step, {"model": GPT(small_config).state_dict()}, {})
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in (*LOSSES, *LATER)))
    return base, chat


@pytest.fixture
def validator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the Hub's place for validation is sent. Its rules are not public: this one only takes it."""
    sent: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.append({"path": self.path, **json.loads(self.rfile.read(int(self.headers["Content-Length"])))})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *about: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield sent
        server.shutdown()


def test_a_card_is_read_as_it_was_meant(runs: tuple[Run, Run], validator: list[dict[str, Any]], tmp_path: Path) -> None:
    text = model_card(runs[1], tmp_path / "out", license="mit", base_model="somebody/base")
    (tmp_path / "README.md").write_text(text)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt_neox", "gpt-from-text", "conversational"],
        "datasets": ["roneneldan/TinyStories"],
        "base_model": "somebody/base",
    }
    for name in (card.data.base_model, *card.data.datasets):
        huggingface_hub.utils.validate_repo_id(name)
    card.validate()
    assert validator == [{"path": "/api/validate-yaml", "repoType": "model", "content": str(card)}]
    assert text.endswith(card.text)
    assert "`mit`; those of somebody/base and of its data hold in any case." in text


def test_a_card_tells_how_the_model_came_to_be(runs: tuple[Run, Run], tmp_path: Path) -> None:
    text = model_card(runs[1], tmp_path / "out")
    table = [line for line in text.splitlines() if line.startswith("| ")][1:]
    # Of the base what it was when it was taken; of the data no path of somebody's machine.
    hub = "[roneneldan/TinyStories](https://huggingface.co/datasets/roneneldan/TinyStories)"
    assert table == [
        f"| pretrain | {hub} | 2 | 1,024 | loss 2.5000 |",
        "| finetune | chats.jsonl: of whoever trained it | 4 | 2,048 | loss 1.5000 |",
    ]
    assert str(tmp_path) not in text and "apply_chat_template" in text and "has not said under which terms" in text
    assert "| finetune | chats.jsonl: of whoever trained it | 2 | 1,024 | loss 2.5000 |" in model_card(
        runs[1], tmp_path / "out", "2"
    )
    # A finetuned run was renamed to what it began with.
    runs[0].write_recipe(dataclasses.replace(runs[0].read_recipe(), base=str(runs[0].path)))
    text = model_card(runs[0], tmp_path / "out")
    assert "| before | not known: that run is gone |" in text and text.count("| finetune |") == 1
    runs[0].config.unlink()
    assert "| before | not known: that run is gone |" in model_card(runs[1], tmp_path / "out")


def test_a_base_model_and_an_imported_one_have_cards(runs: tuple[Run, Run], tmp_path: Path) -> None:
    text = model_card(runs[0], tmp_path / "out")
    assert (
        'tokenizer("Once upon a time"' in text
        and "gpt generate runs/model" in text
        and "--gguf" in text
        and "conversational" not in text
    )
    runs[0].write_recipe(dataclasses.replace(runs[0].read_recipe(), data=DataConfig(source=IMPORTED)))
    runs[0].metrics.unlink()
    text = model_card(runs[0], tmp_path / "out")
    assert "| import | not known: trained elsewhere | 0 | 0 | not measured |" in text and "datasets:" not in text


def test_a_set_of_the_hub_is_not_taken_for_what_a_program_wrote(runs: tuple[Run, Run], tmp_path: Path) -> None:
    recipe = runs[0].read_recipe()
    for name, shown in (
        ("stories-of-mine/tales", "[stories-of-mine/tales](https://huggingface.co/datasets/stories-of-mine/tales)"),
        ("stories-instruct:brief", "stories-instruct:brief: written by a program, not by people"),
    ):
        runs[0].write_recipe(dataclasses.replace(recipe, data=DataConfig(source=name)))
        assert f"| {shown} |" in model_card(runs[0], tmp_path / "out")


@pytest.mark.parametrize("bad", ["My own", "mit\ntags: x", ""])
def test_a_licence_that_the_hub_cannot_know_is_refused(runs: tuple[Run, Run], bad: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--license"):
        model_card(runs[0], tmp_path / "out", license=bad)

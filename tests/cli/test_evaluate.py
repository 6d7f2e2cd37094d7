"""gpt evaluate"""

import errno
import json
from pathlib import Path

import pytest

from tests.cli.conftest import LEARN, Gpt
from tests.engine.test_folders import holder

FEW = ("-n", "2", "--tokens", "500")


@pytest.fixture(autouse=True)
def measures() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")


def test_a_run_is_measured_shown_and_written(gpt: Gpt, trained: Path) -> None:
    result = gpt("evaluate", str(trained), *FEW)
    assert result.code == 0, result.err
    for part in ("stories, validation", "perplexity", "bits per byte", "rougeL", "story score", "tok:13a", "seed 0"):
        assert part in result.out
    written = json.loads((trained / "evaluation-stories-validation.json").read_text())
    assert written["runs"][0]["step"] == 2 and len(written["cases"]) == 1
    assert "| perplexity |" in (trained / "report.md").read_text()
    assert gpt("evaluate", str(trained), *FEW) == result


def test_a_result_that_cannot_be_written_is_shown(gpt: Gpt, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    before = sorted(trained.rglob("*"))
    monkeypatch.setattr("train.evaluation.write_atomically", refuse)
    result = gpt("evaluate", str(trained), *FEW)
    assert result.code == 0 and "perplexity" in result.out and "written to" not in result.out
    assert "the result could not be written into runs/small: Read-only file system" in result.err
    assert sorted(trained.rglob("*")) == before


def test_while_a_run_is_trained_its_report_is_left_to_its_end(gpt: Gpt, trained: Path) -> None:
    report = (trained / "report.md").read_text()
    with holder(trained):
        assert gpt("evaluate", str(trained), *FEW).code == 0
        assert (trained / "report.md").read_text() == report
    assert (trained / "evaluation-stories-validation.json").exists()
    assert gpt("train", "--out", str(trained), "--resume", "--steps", "3").code == 0
    assert "| perplexity |" in (trained / "report.md").read_text()


def test_another_run_and_other_data(gpt: Gpt, trained: Path) -> None:
    Path("words.txt").write_text("<|endoftext|>\n".join(f"This is little story number {n}.\n" for n in range(300)))
    result = gpt("evaluate", str(trained), "--data", "words.txt", "--against", str(trained), *FEW)
    assert result.code == 0 and "win rate 0.5000" in result.out and "story score" not in result.out
    assert (trained / "evaluation-words.txt-validation-against-small.json").exists()


def test_other_scripts_are_measured_with_other_tokenizers(gpt: Gpt, trained: Path) -> None:
    Path("russian.txt").write_text("<|endoftext|>\n".join(f"Лиса {n} бежала домой.\n" for n in range(300)))
    command = ("evaluate", str(trained), "--data", "russian.txt", "-n", "2", "--tokens", "500")
    first = gpt(*command)
    assert first.code == 0 and "--rouge-tokenizer words reads any script" in first.out, first.err
    result = gpt(*command, "--bleu-tokenizer", "intl", "--rouge-tokenizer", "words")
    assert result.code == 0 and "tok:intl" in result.out and "--rouge-tokenizer" not in result.out, result.err
    written = json.loads((trained / "evaluation-russian.txt-validation.json").read_text())
    assert written["tokenizers"] == {"bleu": "intl", "rouge": "words"}
    wrong = gpt(*command, "--bleu-tokenizer", "russian")
    assert wrong.code == 2 and "no tokenizer 'russian'" in wrong.err


def test_a_reward_model_judges_answers_of_two_runs(gpt: Gpt, chat: str) -> None:
    assert gpt("reward", chat, "--data", "pairs.jsonl", *LEARN).code == 0
    Path("asks.jsonl").write_text("".join(f'{{"ask": "say {n}", "reply": "{n}!"}}\n' for n in range(200)))
    data = ("--data", "asks.jsonl", "--prompt-column", "ask", "--response-column", "reply")
    result = gpt("evaluate", chat, *data, "--reward", f"{chat}-reward", "--against", chat, "-n", "4", "--tokens", "500")
    assert result.code == 0 and "By reward runs/small-chat wins 0, ties 4" in result.out, result.err
    written = json.loads(next(Path(chat).glob("evaluation-asks*")).read_text())
    assert {"value", "low", "high"} <= written["runs"][0]["measures"]["reward"].keys()
    documents = gpt("evaluate", "runs/small", "--reward", f"{chat}-reward", *FEW)
    assert documents.code == 2 and "scores answers in conversations" in documents.err


def test_wandb_learns_the_measures(gpt: Gpt, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []

    class Recorder:
        def __init__(self, *arguments: object) -> None:
            pass

        def log(self, metrics: dict[str, float]) -> None:
            logged.append(metrics)

        def close(self) -> None:
            logged.append({})

    pytest.importorskip("wandb")
    monkeypatch.setattr("train.tracking.Wandb", Recorder)
    assert gpt("evaluate", str(trained), "-n", "0", "--tokens", "200", "--wandb").code == 0
    assert logged[0]["step"] == 2 and logged[0]["evaluation-stories-validation/loss"] > 0 and logged[1:] == [{}]


def test_mistakes_are_said_plainly(gpt: Gpt, trained: Path) -> None:
    assert "is not a run" in gpt("evaluate", "nowhere").err
    assert "no data is called" in gpt("evaluate", str(trained), "--data", "nothing").err
    result = gpt("evaluate", str(trained), "--split", "exam")
    assert result.code == 2 and "there is no split 'exam'" in result.err

"""What a run says before it starts, in the units of its stage; those of pairs and answers stand with their stages."""

import json
from pathlib import Path

import pytest

from engine import disk
from engine.checkpoint import checkpoints
from engine.config import DataConfig, Recipe, override
from engine.errors import DiskError
from engine.laws import LOSSES, Loss
from engine.planning import checkpoint_bytes
from engine.run import Run
from engine.runtime import Runtime
from tests.train.conftest import Recorder, Train
from train.data.shards import TokenShards
from train.finetune import finetune, finetuning_recipe


def test_pretraining_counts_tokens_and_epochs(small: Recipe, train: Train) -> None:
    _, recorder = train(override(small, "loop.micro_batch", 2))
    tokens = {split: TokenShards(small.data.source, split).tokens for split in ("train", "validation")}
    (data,) = (line for line in recorder.said if line.startswith("data"))
    assert data.startswith(
        f"data       {small.data.source}: {tokens['train']:,} tokens to train on, {tokens['validation']:,} tokens to "
    )
    assert "batch      4 x 32 = 128 tokens a step, 2 rows at a time" in recorder.said
    assert not [line for line in recorder.said if "forecast" in line]
    assert f"budget     6 steps, 768 tokens, {768 / tokens['train']:.2f} epochs" in recorder.said


def test_a_run_on_known_text_says_what_it_should_reach_and_that_it_does_not(
    small: Recipe, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    easy = Loss(0.1, 0.0, 0.3, 0.0, 0.3, 1.0, "blocks", factor=1.0, spread=0.1, weights=(1e-4, 10), tokens=(1e-4, 10))
    monkeypatch.setitem(LOSSES, small.data.source, easy)
    _, known = train(override(small, "loop.samples", 0), "known")
    said = [line for line in known.said if "forecast" in line]
    assert said[0] == "forecast   0.100 bits per byte (0.085 to 0.118) at the end"
    assert len(said) == 2 and "bits per byte are above the forecast of this step" in said[1]


def test_epochs_of_conversations_are_right_although_they_leave_padding(
    small: Recipe, train: Train, cpu: Runtime, tmp_path: Path
) -> None:
    rows = [{"prompt": f"say {word} {n}", "response": f"{word} {word}!"} for n in range(40) for word in ("fox", "owl")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome, _ = train(override(small, "model.context", 64), "base")
    data = DataConfig(source=str(tmp_path / "chats.jsonl"))
    recipe = finetuning_recipe(Run(tmp_path / "base"), outcome.checkpoint, data)
    recorder = Recorder()
    steps = finetune(override(recipe, "loop.batch", 2), Run(tmp_path / "chat"), cpu, recorder).step
    (budget,) = (line for line in recorder.said if line.startswith("budget"))
    said, _, epochs = budget.removesuffix(" epochs").rpartition(", ")
    assert said == f"budget     {steps} steps, up to {128 * steps:,} tokens"
    learnt = [line["epoch"] for line in recorder.logged if "epoch" in line]
    # One epoch was asked for, and comes out even to half a step.
    assert float(epochs) == pytest.approx(learnt[-1], abs=0.02) == pytest.approx(1, abs=0.5 / steps + 0.01)


def test_a_run_whose_checkpoints_do_not_fit_says_so_before_it_starts(
    small: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, recorder = train(small, "known")
    used = sum(file.stat().st_size for file in outcome.checkpoint.path.glob("*.safetensors"))
    size = checkpoint_bytes(override(small, "model.vocab_size", 400))
    assert not any(line.startswith("disk ") for line in recorder.said) and size == pytest.approx(used, rel=0.1)

    free = checkpoint_bytes(small)
    monkeypatch.setattr(disk, "free", lambda path: free)
    _, recorder = train(override(small, "loop.keep", 30))
    (said,) = (line for line in recorder.said if line.startswith("disk "))
    assert f"{disk.in_words(free)} are free" in said and f"{disk.in_words(32 * free)} will be wanted" in said
    # It goes on only with room for a checkpoint, but what a crash left half written goes first.
    (abandoned := tmp_path / "run" / "checkpoints" / ".writing-step-00000007").mkdir()
    monkeypatch.setattr(disk, "free", lambda path: 0 if abandoned.exists() else free)
    assert train(small, resume=True)[0].step == 6
    monkeypatch.setattr(disk, "free", lambda path: 1000)
    with pytest.raises(DiskError, match=r"a checkpoint takes .* MB, and 1,000 bytes are free on the disk of .*none"):
        train(small, "none")
    assert not (tmp_path / "none").exists() and checkpoints(tmp_path / "run" / "checkpoints")

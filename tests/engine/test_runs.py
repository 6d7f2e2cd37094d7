"""The runs in a folder at a glance, damaged ones too, and what is said of a path that is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.config import BudgetConfig, ModelConfig, Recipe, override
from engine.errors import InputError
from engine.folders import LOCK
from engine.run import Run
from engine.runs import TAIL_BYTES, is_written, list_runs

MODEL = ModelConfig(vocab_size=300, width=16, blocks=1, heads=2, context=16)
RECIPE = Recipe(name="nano", model=MODEL, budget=BudgetConfig(steps=20))
HOLD = "import fcntl, sys; file = open(sys.argv[1], 'wb'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()"


def make(path: Path, recipe: Recipe = RECIPE, step: int = 10, loss: float | None = 2.5, progress: float = 0.5) -> Run:
    run = Run(path)
    run.write_recipe(recipe)
    saved = checkpoint.save(run.checkpoints, step, {"model": {"weight": torch.ones(4)}}, {})
    if loss is not None:
        saved.record_evaluation({"loss": loss})
    lines = [{"step": step, "loss": 3.5, "progress": progress}, {"step": 1, "validation_loss": loss}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in (lines if loss else lines[:1])))
    return run


def test_each_run_is_told_by_kind_base_step_loss_and_state(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    base = make(runs / "base", step=20, progress=1.08)  # minutes are over only after the last step
    tuned = override(override(RECIPE, "base", str(base.path)), "chat", True)
    make(runs / "base-chat", tuned, loss=None)
    make(runs / "demo" / "ppo", override(tuned, "alignment.method", "ppo"), progress=0.25)
    make(runs / "reward", override(tuned, "reward.implicit", True))
    make(runs / "imported", override(RECIPE, "data.source", "imported"))
    (runs / "exported").mkdir()
    (runs / "exported" / "config.json").write_text('{"model_type": "gpt_neox"}')
    found = {str(each.path.relative_to(runs)): each for each in list_runs(runs)}
    assert {name: (each.kind, each.base, each.step, each.steps, each.state) for name, each in found.items()} == {
        "base": ("pretrain", None, 20, 20, "done"),
        "base-chat": ("finetune", "base", 10, 20, "stopped"),
        "demo/ppo": ("ppo", "../base", 10, 40, "stopped"),
        "imported": ("import", None, 10, 20, "done"),
        "reward": ("reward", "base", 10, 20, "stopped"),
    }
    assert (found["base"].loss, found["base"].validated) == (2.5, True)
    assert (found["base-chat"].loss, found["base-chat"].validated) == (3.5, False)
    size = sum(file.stat().st_size for file in base.path.rglob("*") if file.is_file())
    assert found["base"].bytes == size and found["base"].saved == next(base.checkpoints.iterdir()).stat().st_mtime
    assert [each.path for each in list_runs(base.path)] == [base.path]
    (runs / "linked").symlink_to(base.path)
    (runs / "circle").symlink_to(runs)
    assert {each.path for each in list_runs(runs)} == {runs / name for name in (*found, "linked")}


def test_a_damaged_run_is_a_row_that_says_what_is_wrong(tmp_path: Path) -> None:
    cut, short, odd, rest, wild = (make(tmp_path / name) for name in ("cut", "short", "odd", "rest", "wild"))
    cut.config.write_text(cut.config.read_text()[:-40])
    next(short.checkpoints.glob("*/model.safetensors")).write_bytes(b"")
    odd.metrics.write_bytes(b'\xff\n[1]\n{"step": "x"}\n' + b"x" * (TAIL_BYTES + 1) + b'\n{"step": 12, "loss": 3')
    rest.config.unlink()
    wild.metrics.write_text('{"step": 3, "progress": 1e-320}\n{"step": 11, "validation_loss": NaN}\n')
    found = {each.path.name: each for each in list_runs(tmp_path)}
    assert [found[name].state for name in ("cut", "short", "odd", "rest")] == ["damaged"] * 2 + ["stopped", "damaged"]
    assert "config.json is damaged" in found["cut"].damage and found["cut"].loss == 2.5 and found["cut"].step == 10
    assert "model.safetensors is missing, cut short or changed" in found["short"].damage
    assert (found["wild"].loss, found["wild"].step, found["wild"].steps) == (2.5, 10, None)
    assert found["odd"].loss == 2.5 and "no config.json" in found["rest"].damage


def test_a_run_is_running_while_somebody_holds_its_lock_and_not_after_a_kill(tmp_path: Path) -> None:
    lock = make(tmp_path / "a").path / LOCK
    assert not is_written(lock.parent)
    holder = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert list_runs(tmp_path)[0].state == "running"
        process.kill()
    assert lock.exists() and list_runs(tmp_path)[0].state == "stopped"


def test_the_run_that_may_be_meant_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def said(path: str) -> str:
        with pytest.raises(InputError) as error:
            Run(Path(path)).read_config()
        return str(error.value)

    assert said("nano").endswith("train one with `gpt train nano`")
    for name in ("runs/nano", "runs/nano-chat", "runs/demo/ppo", "mine/tiny"):
        make(Path(name))
    assert said("nano").endswith("nano is not a run: it has no config.json; did you mean runs/nano?")
    assert said("runs/nano-chatt").endswith("did you mean runs/nano-chat?")
    assert said("run/ppo").endswith("did you mean runs/demo/ppo?")
    assert said("mine/tinny").endswith("did you mean mine/tiny?")
    assert said("runs/demo").endswith("it holds runs: runs/demo/ppo")
    assert said("runs").endswith("it holds runs: runs/demo/ppo, runs/nano, runs/nano-chat")
    assert said("something").endswith("`gpt runs` lists those that there are")


def test_a_glance_reads_neither_torch_nor_all_of_the_metrics(tmp_path: Path) -> None:
    line = "import sys, engine.runs, train.tracking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], cwd=Path(__file__).parents[2]).returncode == 0
    run = make(tmp_path / "a", loss=None)
    run.metrics.write_text("x" * TAIL_BYTES + "\n" + run.metrics.read_text())
    assert list_runs(tmp_path)[0].loss == 3.5

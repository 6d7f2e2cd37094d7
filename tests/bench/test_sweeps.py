"""Sweeps: which runs there are and in which order, what a line holds, what is left out, and what a crash costs."""

import argparse
import json
from pathlib import Path

import pytest

from bench import sweeps
from bench.harness import Figures
from engine.config import preset
from engine.errors import InputError
from tests.train import conftest

data = conftest.prepared


def options(data: Path, kind: str = "transfer", **changed: object) -> argparse.Namespace:
    small = {"shapes": "32x1,64x2", "batches": "2", "rates": "0.5,1,2", "tokens": "2000,1000", "seeds": 1}
    given = (
        {"data": data, "precision": "fp32", "set": [], "change": [], "vary": "all", "held_out": 10**15}
        | small
        | changed
    )
    return argparse.Namespace(kind=kind, **given)


def test_each_shape_is_trained_at_each_rate_fewest_tokens_and_middle_rates_first(data: Path) -> None:
    found = sweeps.tasks("transfer", options(data))
    seen = [(task.recipe.budget.tokens, task.about["rate"], task.recipe.model.width) for task in found]
    middle_first = (1, 0.5, 2)
    assert seen == [(tokens, rate, width) for tokens in (1000, 2000) for rate in middle_first for width in (32, 64)]
    base, halved = (found[number].recipe for number in (1, 3))
    assert (base.model.heads, base.model.blocks) == (2, 2) and len({task.key for task in found}) == len(found)
    for each in sweeps.RATES:
        assert getattr(halved.optimizer, each) == getattr(base.optimizer, each) / 2
    (_, head) = sweeps.tasks("transfer", options(data, shapes="64x2", rates="1,2", tokens="1000", vary="head_rate"))
    changed = {each for each in sweeps.RATES if getattr(head.recipe.optimizer, each) != getattr(base.optimizer, each)}
    assert changed == {"head_rate"}
    with pytest.raises(InputError, match="--vary names haed_rate"):
        sweeps.tasks("transfer", options(data, vary="haed_rate"))


def test_changes_are_compared_with_a_base_that_has_what_all_runs_are_given(data: Path, tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(json.dumps({"slow": ["optimizer.matrix_rate=0.01"]}))
    change = ["plain=model.mlp=gelu,model.mlp_width=24", str(tmp_path / "more.json")]
    given = options(data, "helped", change=change, shapes="128x4", rates="1", seeds=2, set=["loop.log_every=5"])
    base, plain, slow = (task.recipe for task in sweeps.tasks("helped", given)[:3])
    assert (base.model.mlp, plain.model.mlp, plain.model.mlp_width) == ("gated", "gelu", 24)
    assert base.optimizer == plain.optimizer == preset("nano").optimizer and slow.optimizer.matrix_rate == 0.01
    assert {each.loop.log_every for each in (base, plain, slow)} == {5}
    with pytest.raises(InputError, match=r"--set model\.wide"):
        sweeps.tasks("helped", options(data, "helped", change=["wrong=model.wide=24"]))


def test_a_run_is_a_line_and_the_same_sweep_goes_on_after_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, crashing = tmp_path / "runs.jsonl", {0.5}

    def here(work, rows, seconds):  # type: ignore[no-untyped-def]
        # In a process of its own each would import torch anew; test_tuning.py has what becomes of those.
        (task,) = rows
        yield {"reason": "the process ended with -9"} if task.about["rate"] in crashing else work(task)

    monkeypatch.setattr(sweeps, "in_processes", here)
    # Begun with bigrams, a model of so few steps falls by no more than what differs between texts.
    local = ["model.start=local"]
    wanted = sweeps.tasks("transfer", options(data, shapes="32x1", rates="1,0.5", tokens="2000", set=local))
    lines = list(sweeps.sweep(wanted, out, workers=1))
    assert [line.get("reason") for line in lines] == [None, "the process ended with -9"]
    (run,) = sweeps.read([out])
    assert run == json.loads(json.dumps(lines[0]))
    model = wanted[0].recipe.model
    assert run["parameters"] == model.parameters and run["block_parameters"] == 4 * 32**2 + 3 * 32 * 64
    assert run["tokens"] == 4 * run["tokens_per_step"] == 2048
    assert run["rates"]["matrix_rate"] == wanted[0].recipe.optimizer.matrix_rate
    assert run["validation"][-1] == [2048, round(run["bits_per_byte"], 4)] and len(run["validation"]) == 4
    assert run["training"][-1][0] == 1 and 0 < run["bits_per_byte"] < run["training"][0][1]
    crashing.clear()
    (other,) = sweeps.sweep(wanted, out, workers=1)
    assert other["rate"] == 0.5 and list(sweeps.sweep(wanted, out, workers=1)) == []
    # What stands there for another sweep is not made again, and is a line of this one too.
    same = sweeps.tasks("size", options(data, "size", shapes="32x1", rates="1", tokens="2000", set=local))
    assert list(sweeps.sweep(same, out, workers=1)) == [] == list(sweeps.sweep(same, out, workers=1))
    assert [(line["kind"], line["key"]) for line in sweeps.read([out])][1:] == [
        ("transfer", other["key"]), ("size", run["key"])
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["runs.jsonl"]


def test_a_change_counts_where_its_mean_falls_by_two_deviations() -> None:
    def runs(name: str, *found: float) -> list[Figures]:
        about = {"kind": "helped", "data": "ts", "budget": 600_000, "name": name, "tokens_per_second": 9000}
        return [about | {"bits_per_byte": each} for each in found]

    lines = runs("good", 1.06, 1.08) + runs("base", 1.09, 1.11) + runs("noise", 1.08, 1.10) + runs("single", 1.0)
    _, _, base, *others = sweeps.helped(lines)
    assert base == "| ts, 600,000 | base | 1.1000 ± 0.0141 | +0.0000 | - | 9,000 | 2 |"
    assert [row.split(" | ")[3:5] for row in others] == [["-0.0300", "yes"], ["-0.0100", "no"], ["-0.1000", "-"]]

"""From the lines of sweeps to laws.json and its pictures: the constants that made the lines are in it."""

import itertools
import json
import math
from pathlib import Path

import pytest

from bench import findings
from bench.harness import Figures
from engine.laws import Law

LENGTHS = (100_000, 300_000, 1_000_000, 3_000_000)
LAW = Law(0.0, of_weights=0.46, weights_power=0.38, of_tokens=1.5, tokens_power=0.52, power=0.34)


def line(
    kind: str, width: int, blocks: int, tokens: int, batch: int = 2048, rate: float = 1.0, seed: int = 0
) -> Figures:
    """Return a run: the best rate rises by the root of the batch and falls with depth; large batches cost."""
    weights, best = 12 * blocks * width**2, (batch / 2048) ** 0.5 * (blocks / 4) ** -0.3
    loss = LAW(weights / 1e6, tokens / 1e6) * (1 + (batch / 2**18) ** 2 + 0.02 * math.log2(rate / best) ** 2)
    about = {
        "kind": kind,
        "name": kind,
        "data": "text",
        "width": width,
        "blocks": blocks,
        "varied": "all",
        "rate": rate,
        "seed": seed,
    }
    return about | {
        "budget": tokens, "tokens": tokens, "unique_tokens": 10**7, "tokens_per_step": batch,
        "bits_per_byte": loss * (1 + 0.002 * seed), "loss": 3 * loss, "rates": {"matrix_rate": 0.02 * rate},
        "block_parameters": weights, "head_parameters": 4096 * width, "parameters": weights + 8192 * width,
        "training": [[0.1, 1.1 * LAW(weights / 1e6, tokens / 1e7)], [1.0, loss]], "versions": {"commit": "abc"},
    }  # fmt: skip


def test_what_made_the_runs_is_found_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[findings.Panel]] = {}
    draw = findings.draw
    monkeypatch.setattr(findings, "draw", lambda panels, path: drawn.setdefault(path.name, panels))
    monkeypatch.setattr(findings, "RESAMPLES", 3)
    rates, shapes = (0.25, 0.5, 1, 2, 4), ((64, 4), (128, 4), (96, 2), (96, 4), (96, 8))
    runs = [line("transfer", *shape, 300_000, rate=rate) for shape, rate in itertools.product(shapes, rates)]
    runs += [
        line("batch", 128, 4, tokens, batch, rate)
        for tokens, batch, rate in itertools.product(
            (600_000, 2_400_000), [2**n for n in range(10, 16)], (0.5, 1, 2, 4, 8)
        )
    ]
    runs += [
        line("size", *shape, tokens)
        for shape, tokens in itertools.product(((64, 2), (64, 4), (96, 8), (128, 4), (256, 2), (256, 8)), LENGTHS)
    ]
    runs += [
        each | {"data": "harder", "bits_per_byte": 1.5 * each["bits_per_byte"]}
        for each in (line("size", 128, 4, 100_000), line("size", 128, 4, 300_000))
    ]
    runs += [line("helped", 128, 4, 600_000, seed=seed) for seed in (0, 1)]
    found = findings.summarise(runs, tmp_path / "laws.json")
    assert json.loads((tmp_path / "laws.json").read_text())["commits"] == ["abc"]
    titles = {name: [panel.title for panel in panels] for name, panels in drawn.items()}
    assert titles["laws-transfer.png"] == ["text, 300,000 tokens, blocks 4", "text, 300,000 tokens, width 96"]
    assert titles.keys() == {"laws-transfer.png", "laws-batch.png", "laws-size.png"}
    assert {name: at for name, (at, _) in drawn["laws-transfer.png"][1].minima.items()} == pytest.approx(
        {"2 blocks": 2**0.3, "4 blocks": 1, "8 blocks": 2**-0.3}, rel=0.01
    )
    draw([*drawn["laws-transfer.png"][1:], drawn["laws-batch.png"][2]], tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    assert found["noise"] == pytest.approx(0.002 / 2**0.5, rel=0.01)

    (spread,), depth = found["transfer"]["spreads"], found["transfer"]["corrections"]["all"]["blocks"]
    assert spread["spread"] == pytest.approx(4**0.3, rel=0.01) and depth["power"] == pytest.approx(-0.3, abs=0.01)
    assert found["transfer"]["corrections"]["all"]["width"]["power"] == pytest.approx(0, abs=0.01)
    assert found["batch"]["rate"]["batch"]["power"] == pytest.approx(0.5, abs=0.01)
    # At 2^18 x 0.1 tokens a step the loss is 1% higher.
    for largest in found["batch"]["largest_within_1%"]:
        assert largest["batch"] == pytest.approx(2**18 * 0.1, rel=0.15)
    said = list(findings.in_words(found))
    assert said[1].startswith("left in the best rates (all): width^") and "blocks^-0.30 (-0.3" in said[1]
    assert said[0] == "text, 300,000 tokens, rates varied: all: 5 of 5 minima inside, within a factor of 1.52"
    own = found["size"]
    assert own["text"] == "text" and own["size"] == "blocks"
    assert own["laws"]["blocks"]["tokens_power"] == pytest.approx(LAW.tokens_power, abs=0.02)
    assert own["course"]["0.1"][0] == pytest.approx(1.1, rel=0.01)
    assert own["texts"] == {
        "harder": {"runs": 2, "factor": pytest.approx(1.5, rel=0.005), "scatter": pytest.approx(0, abs=1e-3)}
    }
    # A floor that is not there makes it worse, and what is far is foretold by all of them.
    assert own["floors"]["0.0"]["scatter"] < own["floors"]["0.35"]["scatter"]
    assert own["far"]["large"]["bits_per_byte"] < own["far"]["tiny"]["bits_per_byte"]
    assert (
        said[-3].startswith("harder: 1.49")
        and "times that, within 0.0%" in said[-3]
        and said[-1].startswith("large: 0.")
    )

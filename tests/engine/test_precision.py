"""auto, for training on a CPU: what a few steps say, and not what the chip claims."""

import pytest
import torch

from engine import precision
from engine.config import ModelConfig, preset
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "bf16")
NANO = preset("nano").model


@pytest.mark.parametrize(("ratio", "expected"), [(1.24, "bf16"), (0.2, "fp32")])
def test_the_faster_precision_is_chosen_and_the_line_says_why(
    ratio: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda model: ratio)
    chosen, why = precision.for_training(CPU, NANO)
    assert chosen == Runtime(CPU.device, expected)
    assert why == f"{expected}: bf16 trains {ratio:.2f}x as fast as fp32"


@pytest.mark.parametrize("machine", [Runtime(CPU.device, "fp32"), Runtime(torch.device("cuda", 0), "bf16")])
def test_nothing_is_measured_without_a_choice(machine: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "_measure")
    assert precision.for_training(machine, NANO) == (machine, "")


def test_a_block_is_measured_once_and_draws_nothing_from_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(precision, "TOKENS", 8)
    precision._measure.cache_clear()
    before = torch.get_rng_state()
    # Toys of any width count as one as wide as nano.
    first = precision.bf16_speedup(ModelConfig(64, 16, 1, 2, 32))
    assert first > 0 and first == precision.bf16_speedup(ModelConfig(64, 32, 7, 4, 64))
    assert precision._measure.cache_info().misses == 1
    assert torch.equal(torch.get_rng_state(), before)
    precision._measure.cache_clear()


def test_without_units_bf16_is_not_even_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: False)
    assert precision.bf16_speedup(NANO) == 0.0


def test_the_block_that_is_measured_is_small_however_wide_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[ModelConfig] = []
    monkeypatch.setattr(precision, "cpu_multiplies_bf16", lambda: True)

    def measure(block: ModelConfig) -> float:
        blocks.append(block)
        return 1.0

    monkeypatch.setattr(precision, "_measure", measure)
    for width, heads in ((65536, 4), (16, 2), (1024, 16), (300, 3)):
        precision.bf16_speedup(ModelConfig(4096, width, 1000, heads, 256))
    assert all(64 <= block.width <= 256 and block.blocks == 1 for block in blocks)

"""The estimate of memory against what a training step really allocates, by the byte."""

import dataclasses
import gc
from typing import Any

import pytest
import torch
from torch import nn

from engine.config import ModelConfig, OptimizerConfig, preset
from engine.model import GPT
from engine.planning import Setup, elements, peak_memory, step_memory
from tests.engine.memory import Step, checkpointed, packed, peak_bytes
from train.optimizer import Optimizer

# vocabulary, width, blocks, heads, context
SETUPS = {
    "many activations": Setup(ModelConfig(1024, 64, 4, 4, 128), "muon", 1024),
    "a large vocabulary": Setup(ModelConfig(16384, 64, 1, 4, 32), "adamw", 64),
    "wide, so that the optimizer's work is the peak": Setup(ModelConfig(2048, 256, 3, 8, 64), "muon", 128),
    "gradients added up": Setup(ModelConfig(512, 96, 2, 2, 64), "adamw", 512, accumulate=True),
    "checkpointing": Setup(ModelConfig(512, 64, 6, 4, 128), "muon", 1024, checkpointing=True),
    "bf16": Setup(ModelConfig(256, 32, 2, 2, 32), "muon", 64, element_size=2),
    "biases, a parallel residual": Setup(
        ModelConfig(512, 64, 3, 4, 64, biases=True, parallel_residual=True, rotary_share=0.5), "muon", 512
    ),
}


def training_step(setup: Setup) -> Step:
    model = GPT(setup.model)
    model.compute_dtype = torch.bfloat16 if setup.element_size == 2 else torch.float32
    if setup.checkpointing:
        checkpointed(model)
    config = dataclasses.replace(OptimizerConfig(), kind=setup.optimizer)
    optimizer = Optimizer(model, config, matmul_dtype=model.compute_dtype)

    def step() -> None:
        for _ in range(2 if setup.accumulate else 1):
            model.loss(**packed(setup.tokens, setup.model.vocab_size, setup.model.context)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("name", SETUPS)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(name: str) -> None:
    setup = dataclasses.replace(SETUPS[name], gpu=False)
    measured = peak_bytes(lambda: training_step(setup))
    assert peak_memory(setup) == pytest.approx(measured, rel=0.1)


def test_one_rank_keeps_every_parameter() -> None:
    for name in ("nano", "tiny", "large"):
        model = preset(name).model
        assert sum(elements(Setup(model, "muon", 1))) == model.parameters


def test_more_ranks_and_checkpointing_need_less_and_more_tokens_more() -> None:
    setup = Setup(preset("large").model, "adamw", 8192, element_size=2, ranks=8, shard=True)
    peak = peak_memory(setup)
    assert peak_memory(dataclasses.replace(setup, ranks=64)) < peak
    assert peak_memory(dataclasses.replace(setup, checkpointing=True)) < peak
    assert peak_memory(dataclasses.replace(setup, tokens=16384)) > peak
    assert peak_memory(dataclasses.replace(setup, shard=False)) > peak


def test_every_moment_names_its_parts() -> None:
    moments = step_memory(Setup(preset("tiny").model, "muon", 2048))
    assert list(moments) == ["loss", "backward begins", "backward ends", "optimizer step"]
    assert all(size >= 0 for parts in moments.values() for size in parts.values())
    assert moments["loss"]["logits"] and moments["optimizer step"]["optimizer's work"]


def test_what_an_earlier_test_left_in_a_cycle_does_not_lower_a_measured_peak() -> None:
    def build() -> Step:
        gc.collect()
        held = [torch.ones(1000)]
        return held.clear

    cycle: list[Any] = [torch.ones(1000)]
    cycle.append(cycle)
    del cycle
    assert peak_bytes(build) == 4000

"""The estimate of memory against what a training step really allocates, by the byte."""

import dataclasses
import gc
from typing import Any

import pytest
import torch

from engine.config import LoraConfig, ModelConfig, OptimizerConfig, preset
from engine.lora import adapt
from engine.model import GPT
from engine.planning import Setup, elements, learning, peak_memory, step_memory
from tests.engine.memory import Step, packed, peak_bytes
from tests.engine.relatives import RELATIVES
from train.optimizer import Optimizer


def llama(**settings: Any) -> ModelConfig:
    shape: dict[str, Any] = {"vocab_size": 512, "width": 64, "blocks": 3, "heads": 4, "context": 128, "mlp_width": 192}
    return ModelConfig(**(shape | {"norm": "rms", "mlp": "gated", "key_heads": 2} | settings))


# SmolLM2-135M, with two of its 30 blocks and little of its vocabulary. bench/results has the figures of the whole.
SMOL = llama(vocab_size=2048, width=576, blocks=2, heads=9, key_heads=3, mlp_width=1536, tied=True)
LORA = LoraConfig(rank=8)
# vocabulary, width, blocks, heads, context
SETUPS = {
    "many activations": Setup(ModelConfig(1024, 64, 4, 4, 128), "muon", 1024),
    "a large vocabulary": Setup(ModelConfig(16384, 64, 1, 4, 32), "adamw", 64),
    "one optimizer for all matrices": Setup(ModelConfig(2048, 64, 2, 4, 64), "normuon", 256),
    "wide, so that the optimizer's work is the peak": Setup(ModelConfig(2048, 256, 3, 8, 64), "muon", 128),
    "gradients added up": Setup(ModelConfig(512, 96, 2, 2, 64), "adamw", 512, accumulate=True),
    "checkpointing": Setup(ModelConfig(512, 64, 6, 4, 128), "muon", 1024, checkpointing=True),
    "bf16": Setup(ModelConfig(256, 32, 2, 2, 32), "muon", 64, element_size=2),
    "biases, a parallel residual": Setup(
        ModelConfig(512, 64, 3, 4, 64, biases=True, parallel_residual=True, rotary_share=0.5), "muon", 512
    ),
    "mistral, a window": Setup(llama(window=20, pattern="wf"), "adamw", 512, element_size=2),
    "qwen2, tied, biases": Setup(llama(qkv_biases=True, tied=True), "muon", 512, checkpointing=True),
    "qwen3, wide heads": Setup(llama(qk_norm=True, head_width=32), "muon", 512, checkpointing=True),
    "smollm3, blocks that do not rotate": Setup(llama(pattern="fn", tied=True), "muon", 512, accumulate=True),
    "smollm2, bf16": Setup(SMOL, "muon", 256, element_size=2),
    "smollm2, adapters, bf16, checkpointing": Setup(SMOL, "muon", 256, element_size=2, checkpointing=True, lora=LORA),
}


def training_step(setup: Setup) -> Step:
    model = GPT(setup.model)
    model.compute_dtype = torch.bfloat16 if setup.element_size == 2 else torch.float32
    model.checkpoint_activations = setup.checkpointing
    if setup.lora.rank:
        adapt(model, setup.lora)
    config = dataclasses.replace(OptimizerConfig(), kind=setup.optimizer)
    optimizer = Optimizer(model, config, matmul_dtype=model.compute_dtype)

    def step() -> None:
        for _ in range(2 if setup.accumulate else 1):
            model.loss(**packed(setup.tokens, setup.model.vocab_size, setup.model.context)).backward()
        optimizer.clip(1.0)
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
    for model in (*RELATIVES.values(), SMOL):
        assert sum(elements(Setup(model, "muon", 1))) == model.parameters
        assert sum(learning(Setup(model, "muon", 1, lora=LORA))) == LORA.parameters(model)
        adapted = GPT(model)
        adapt(adapted, LORA)
        assert sum(each.numel() for each in adapted.parameters()) == model.parameters + LORA.parameters(model)


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

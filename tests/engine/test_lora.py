"""Adapters: what they compute, what their gradients are, and that whoever reads a checkpoint sees a plain model."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.chat_template import answer_ends
from engine.config import LoraConfig, ModelConfig, override, preset
from engine.errors import InputError
from engine.generate import generate
from engine.lora import Adapted, adapt, freeze, merged
from engine.model import GPT
from engine.run import Run
from engine.runtime import choose
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from tests.engine.memory import packed
from tests.engine.relatives import RELATIVES, relative
from tests.train.conftest import Recorder
from train.pretrain import pretrain

FAMILIES = RELATIVES | {"gpt_neox": relative(biases=True, parallel_residual=True, rotary_share=0.5)}
SOME = LoraConfig(rank=3, alpha=5.0, maps="attention.qkv, mlp.contract")


def adapted(config: ModelConfig, lora: LoraConfig, dtype: torch.dtype = torch.float32) -> GPT:
    """A model whose adapters have learnt something."""
    model = GPT(config).to(dtype)
    adapt(model, lora)
    model.to(dtype)
    for module in model.modules():
        if isinstance(module, Adapted):
            torch.nn.init.normal_(module.lora_b, std=0.3)
    return model


def plain(model: GPT) -> GPT:
    """What is read of its checkpoint."""
    read = GPT(model.config).to(model.embedding.weight.dtype)
    read.load_state_dict(merged(model.state_dict()))
    return read


def gradients(model: GPT) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.loss(**packed(96, model.config.vocab_size, model.config.context)).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [LoraConfig(rank=2), SOME], ids=["all maps", "some"])
def test_gradients_are_the_low_rank_part_of_those_of_the_merged_weights(family: str, lora: LoraConfig) -> None:
    model = adapted(FAMILIES[family], lora, torch.float64)
    whole, found = gradients(plain(model)), gradients(model)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            by_weight = lora.alpha / lora.rank * whole[f"{name}.weight"]
            for part, expected in (("lora_b", by_weight @ module.lora_a.T), ("lora_a", module.lora_b.T @ by_weight)):
                torch.testing.assert_close(found.pop(f"{name}.{part}"), expected, rtol=0, atol=1e-9)
    # Nothing else learns.
    assert not found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_gives_the_same_scores(dtype: torch.dtype) -> None:
    model = adapted(FAMILIES["qwen3"], SOME)
    tokens = torch.randint(64, (2, 40))
    read = plain(model)
    model.compute_dtype = read.compute_dtype = dtype
    with torch.no_grad():
        ours, theirs = (each.logits(each(tokens)) for each in (model, read))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_it_begins_as_the_base_and_keeps_matrices_as_they_are_multiplied() -> None:
    base = GPT(FAMILIES["qwen2"])
    model = GPT(base.config)
    model.load_state_dict(base.state_dict())
    for each in (base, model):
        each.compute_dtype = torch.bfloat16
    adapt(model, LoraConfig(rank=4))
    tokens = torch.randint(64, (2, 40))
    with torch.no_grad():
        assert torch.equal(model(tokens), base(tokens))
    kept = {name: each.dtype for name, each in model.named_parameters() if not each.requires_grad}
    wide = [name for name, dtype in kept.items() if dtype == torch.float32]
    assert wide and all("norm" in name or "bias" in name for name in wide)
    assert kept["embedding.weight"] == kept["blocks.0.mlp.expand.weight"] == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in model.parameters() if each.requires_grad)


def test_a_reward_models_head_learns_and_stays_wide() -> None:
    model = GPT(dataclasses.replace(FAMILIES["smollm2"], scalar_head=True))
    model.compute_dtype = torch.bfloat16
    adapt(model, LoraConfig(rank=1, maps="attention.output"))
    assert model.head_weight.requires_grad and model.head_weight.dtype == torch.float32


def test_decoding_on_a_cpu_knows_what_adapters_add(tokenizer: Tokenizer, small_config: ModelConfig) -> None:
    model = adapted(small_config, LoraConfig(rank=4))
    prompts = [tokenizer.encode(text) for text in ("Once upon", "The fox")]
    options: dict[str, Any] = {"stop_ids": answer_ends(tokenizer), "max_tokens": 20}
    sampling = Sampling(temperature=0.0)
    ours, theirs = (generate(each, tokenizer, prompts, sampling, **options) for each in (model, plain(model)))
    assert [each.ids for each in ours] == [each.ids for each in theirs]


def test_reading_changes_nothing_without_adapters(gpt: GPT) -> None:
    weights = gpt.state_dict()
    assert merged(weights) is weights
    freeze(gpt)
    assert not any(each.requires_grad for each in gpt.parameters())


def test_maps_are_checked_and_pretraining_has_no_adapters(tmp_path: Path) -> None:
    nano = preset("nano")
    assert override(nano, "lora.maps", "mlp.expand").lora.chosen == ("mlp.expand",)
    for maps in ("", "head", "attention.qkv,,mlp.expand"):
        with pytest.raises(InputError, match=r"lora.maps holds .*; it must be all, or of attention.qkv, "):
            override(nano, "lora.maps", maps)
    with pytest.raises(InputError, match=r"lora.rank must be 0 here"):
        pretrain(override(nano, "lora.rank", 8), Run(tmp_path), choose("cpu"), Recorder())

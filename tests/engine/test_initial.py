"""How weights are drawn: as in GPT-2, or with heads that look at the tokens just before."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model import GPT, Positions

TOKENS = 12
SHAPE = ModelConfig(vocab_size=300, width=128, blocks=3, heads=4, context=64, start="local")
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"norm": "rms", "mlp": "gated", "qk_norm": True},
    "qwen3, shared keys": {"norm": "rms", "mlp": "gated", "qk_norm": True, "key_heads": 2},
    "gpt_neox": {},
}


def attention_of(model: GPT, layer: int) -> Tensor:
    """Return how much the last of some random tokens attends to each, in the first pass of a block. [H, T]"""
    tokens, seen = torch.randint(0, 300, (1, TOKENS)), []

    class Watched(Positions):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
            scores = torch.einsum("hd,shd->hs", q[0, -1], keys[0]) / math.sqrt(q.shape[-1])
            seen.append(scores.softmax(-1))
            return super().attend(layer, q, k, v, **options)

    positions, branch, residual = Watched(tokens, model.config, None, None, None), model.embedding(tokens), None
    for number in range(layer + 1):
        branch, residual = model.blocks[number](branch, residual, positions, number)
    return seen[layer]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_heads_look_at_the_tokens_just_before_from_the_first_step_on(name: str) -> None:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SHAPE, **FAMILIES[name]))
    for layer, distances in ((0, (1, 2, 3)), (1, (1, 2))):
        attended = attention_of(model, layer)
        for head, distance in enumerate(distances):
            # A few of all tokens have most of it, and that token as much as any beside it, about.
            near = attended[head, TOKENS - 3 - distance :]
            assert near.sum() > 0.6 and attended[head, TOKENS - 1 - distance] > 0.2, (layer, head)
        assert attended[-1].max() < 0.6


@torch.no_grad()
def test_a_common_part_costs_no_token_its_own() -> None:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SHAPE, **FAMILIES["qwen3"]))
    embedding = model.embedding.weight
    common = embedding.mean(0)
    assert model.head is not None
    assert abs(float((model.head.weight @ common).mean())) < 1e-4
    own = embedding - common
    torch.testing.assert_close(own.std(), torch.tensor(0.02), rtol=0.02, atol=0)
    torch.testing.assert_close(common.norm() / own.norm(dim=1).mean(), torch.tensor(0.5), rtol=0.02, atol=0)


def test_other_weights_are_drawn_as_in_gpt2() -> None:
    torch.manual_seed(0)
    weights = GPT(dataclasses.replace(SHAPE, start="gpt2")).state_dict()
    # What writes to the residual stream is scaled by the depth.
    for name, std in (("expand", 0.02), ("contract", 0.02 / 6**0.5)):
        found = weights[f"blocks.0.mlp.{name}.weight"].std()
        torch.testing.assert_close(found, torch.tensor(std), rtol=0.02, atol=0)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_head_that_finds_out_by_itself_is_always_left(heads: int) -> None:
    GPT(dataclasses.replace(SHAPE, width=32, heads=heads, blocks=1))

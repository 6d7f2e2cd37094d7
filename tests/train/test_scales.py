"""The coordinate check (Yang et al., arXiv:2203.03466): activations keep their scale at every width."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from engine import laws
from engine.config import ModelConfig
from engine.model import GPT
from train.optimizer import Optimizer

DEPTH, STEPS, ROWS, CONTEXT, VOCABULARY = 2, 4, 4, 32, 256
WIDTHS = (32, 64, 128, 256)


def scales(model: ModelConfig) -> dict[str, float]:
    """The root mean square of each block's output and of the logits, and of how much a few steps change them."""
    torch.manual_seed(0)
    gpt = GPT(model)
    tokens = torch.randint(VOCABULARY, (ROWS * CONTEXT,))
    bounds = torch.arange(0, len(tokens) + 1, CONTEXT, dtype=torch.int32)
    seen: dict[str, Tensor] = {}

    def look(name: str, output: tuple[Tensor, Tensor]) -> None:
        seen[name] = (output[0] + output[1]).detach()

    for number, block in enumerate(gpt.blocks):
        block.register_forward_hook(lambda _, __, output, name=f"block {number}": look(name, output))

    def forward() -> dict[str, Tensor]:
        with torch.no_grad():
            logits = gpt.logits(gpt(tokens, cu_seqlens=bounds, max_seqlen=CONTEXT))
        return {**seen, "logits": logits}

    before = forward()
    config = laws.optimizer(model, laws.TUNED.tokens_per_step, laws.TUNED_TOKENS)
    optimizer = Optimizer(gpt, config, matmul_dtype=torch.float32)
    for _ in range(STEPS):
        (gpt.loss(tokens, tokens.roll(-1), cu_seqlens=bounds, max_seqlen=CONTEXT) / len(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = forward()

    def size(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    changes = {f"change of {name}": size(after[name] - value) for name, value in before.items()}
    return {name: size(value) for name, value in before.items() if name != "logits"} | changes


# GPT-2's start has the same deviation at every width: what comes out of a map grows with its inputs.
def test_activations_and_what_steps_change_keep_their_scale_when_the_width_doubles() -> None:
    free: dict[str, Any] = {"blocks": DEPTH, "context": CONTEXT, "vocab_size": VOCABULARY}
    found = [scales(dataclasses.replace(laws.shape(width // laws.ASPECT), **free)) for width in WIDTHS]
    spreads = {name: max(each[name] for each in found) / min(each[name] for each in found) for name in found[0]}
    # Rates or starts that are wrong by a root of the width would make 2.8 of it, or 8.
    assert max(spread for name, spread in spreads.items() if "block" in name) < 1.5, spreads
    assert spreads["change of logits"] < 2.5, spreads

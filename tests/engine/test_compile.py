"""torch.compile changes nothing but the speed, and does not compile anew for every batch."""

from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.model import GPT


def packed(seed: int, tokens: int = 128) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bounds = [0]
    while bounds[-1] < tokens:
        bounds.append(min(tokens, bounds[-1] + int(torch.randint(5, 40, (), generator=generator))))
    ids = torch.randint(0, 50, (tokens,), generator=generator)
    return {"tokens": ids, "targets": ids.roll(-1), "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


# A window in some blocks and none in others: each kind is compiled once.
WINDOWS = {"norm": "rms", "mlp": "gated", "key_heads": 1, "qk_norm": True, "tied": True, "window": 7, "pattern": "wfn"}


@pytest.mark.parametrize(
    "switches", [{}, {"parallel_residual": True, "rotary_share": 0.5, "biases": True}, WINDOWS], ids=str
)
def test_a_compiled_model_learns_the_same_from_batches_packed_in_many_ways(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    # More blocks than torch.compile will compile one function for: they have to share.
    model = GPT(ModelConfig(vocab_size=50, width=16, blocks=10, heads=2, context=64, **switches))

    def loss(model: GPT, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.loss(batch["tokens"], batch["targets"], cu_seqlens=batch["cu_seqlens"])

    compiled = torch.compile(loss, backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(5):
            gradients = []
            for run in (compiled, loss):
                model.zero_grad()
                value = run(model, packed(seed))
                value.backward()
                gradients.append([value.detach(), *(parameter.grad for parameter in model.parameters())])
            for ours, expected in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_is_near_fp32_on_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=50, width=64, blocks=2, heads=2, context=64))
    found = []
    for device, compute in (("cpu", None), ("cuda", dtype)):
        model.to(device).zero_grad()
        model.compute_dtype = compute
        batch = {name: tensor.to(device) for name, tensor in packed(0).items()}
        value = model.loss(batch["tokens"], batch["targets"], cu_seqlens=batch["cu_seqlens"])
        value.backward()
        # Copies: to move the model moves its gradients, and those are on the CPU already.
        gradients = [each.grad.to("cpu", copy=True) for each in model.parameters() if each.grad is not None]
        found.append([value.detach().cpu(), *gradients])
    for exact, half in zip(*found, strict=True):
        assert (half - exact).norm() <= 0.05 * exact.norm()

"""Decoding in int8: nearly the same, and only where it can be."""

import pytest
import torch

from engine import runtime
from engine.batcher import Batcher, Request
from engine.config import ModelConfig
from engine.decoders import CpuDecoder, int8_addmm, int8_mm, quantise
from engine.errors import InputError
from engine.model import GPT, KVCache
from engine.sampling import Sampling


def test_a_product_with_int8_weights_is_off_by_their_rounding() -> None:
    x, weight, added = torch.randn(3, 64), torch.randn(48, 64), torch.randn(3, 48)
    exact = x @ weight.t()
    held = quantise(weight)
    assert (int8_mm(x, held) - exact).abs().max() < 0.03 * exact.abs().max()
    assert torch.equal(int8_addmm(added, x, held), added + int8_mm(x, held))


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(int8_mm(torch.randn(2, 32), quantise(torch.zeros(4, 32))), torch.zeros(2, 4))


def test_int8_decoding_stays_near_the_model(gpt: GPT) -> None:
    gpt.decode_int8 = True
    batcher = Batcher(gpt, slots=1)
    number = batcher.submit(Request([5, 6, 7], Sampling(temperature=0), 2, top_logprobs=1))
    steps = [step for _ in range(2) for step in batcher.step() if step.request == number]
    with torch.no_grad():
        expected = gpt.logits(gpt(torch.tensor([[5, 6, 7, steps[0].token]])))[0, -1].log_softmax(-1)
    assert steps[1].logprob == pytest.approx(expected[steps[1].token].item(), abs=0.5)


def test_int8_is_refused_on_a_gpu_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(InputError, match="int8 is for decoding on a CPU"):
        runtime.choose("cuda", "int8")


def test_products_in_bf16_have_few_sizes() -> None:
    config = ModelConfig(vocab_size=64, width=32, blocks=1, heads=2, context=32)
    for dtype, most in ((torch.float32, 40), (torch.bfloat16, 8)):
        model = GPT(config).to(dtype)
        cache = KVCache(config, 40, 64, device="cpu", dtype=dtype)
        decoder = CpuDecoder(model, cache, torch.zeros(40, dtype=torch.int64))
        sizes = {decoder.padded(rows) for rows in range(1, 41)}
        assert len(sizes) == most and all(rows <= decoder.padded(rows) <= 40 for rows in range(1, 41))
        with torch.inference_mode():
            assert decoder.logits(17, 2).shape == (17, 64)

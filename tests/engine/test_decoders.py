"""Decoding in int8: nearly the same, and only where it can be."""

import pytest
import torch

from engine import runtime
from engine.batcher import Batcher, Request
from engine.errors import InputError
from engine.model import GPT
from engine.sampling import Sampling


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

"""What generation is timed by: the steps in which every sequence has its first token."""

import time

import pytest
import torch

from bench import decoding
from engine.config import ModelConfig
from engine.model import GPT
from engine.runtime import Runtime

CPU = Runtime(torch.device("cpu"), "fp32")
MODEL = GPT(ModelConfig(200, 32, 2, 2, 64)).eval()


def test_tokens_count_from_the_last_first_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # A step reads 16 tokens of prompts, a whole one: so the first sequence has three tokens when the third has one.
    generate = decoding.ours(MODEL, CPU, 0.0, chunk=16)
    before = time.perf_counter()
    generated = generate([[7] * 16] * 3, 8)
    assert [len(each) for each in generated.tokens] == [8, 8, 8] and generated.by_then == 3 + 2 + 1
    assert before < generated.begun < time.perf_counter()
    size = decoding.Size(1, 3, 16, 8)
    monkeypatch.setattr("time.perf_counter", lambda: 12.0)
    figures = decoding.clock(lambda prompts, new: decoding.Generated([], 10.0, 6), [[7]], [], size, CPU)
    assert figures == {"tokens_per_second": (3 * 8 - 6) / 2, "first_token_seconds": 0}


def test_transformers_samples_as_hot_and_says_when_it_began() -> None:
    pytest.importorskip("transformers")
    generated = decoding.transformers(MODEL, CPU, 1.0)([[7] * 16] * 3, 8)
    assert generated.by_then == 3 and [len(each) for each in generated.tokens] == [8, 8, 8]
    assert len({tuple(each) for each in generated.tokens}) == 3

"""A model's steps in one compiled function: right, and the same whoever runs beside, in one turn or many."""

import random
import threading
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from engine import native
from engine.batcher import Batcher, Request, Step
from engine.config import ModelConfig
from engine.decoders import Ending, Reading
from engine.errors import InputError
from engine.model import GPT
from engine.native import NativeDecoder
from engine.sampling import Sampling
from kernels import cpu
from kernels.cpu import step as compiled

OURS = ModelConfig(vocab_size=333, width=48, blocks=2, heads=3, context=150)
LLAMA = replace(OURS, norm="rms", mlp="gated", mlp_width=100)
MODELS = {
    "ours": OURS,
    "wide": replace(OURS, width=160, heads=2, vocab_size=64),
    "GPT-NeoX": replace(OURS, biases=True, parallel_residual=True, rotary_share=0.5),
    # A head for several of queries, and none of whose sizes is a whole number of strips or vectors.
    "Llama": replace(LLAMA, heads=4, key_heads=2, rotary_scaling="llama3", rotary_factor=8.0, rotary_original=64),
    "SmolLM2": replace(LLAMA, heads=9, key_heads=3, head_width=16, tied=True),
    "Qwen2": replace(LLAMA, heads=14, key_heads=2, head_width=8, qkv_biases=True, tied=True, rotary_base=1e6),
    "Qwen3": replace(LLAMA, heads=4, key_heads=1, head_width=20, qk_norm=True),
    "Mistral": replace(LLAMA, heads=6, key_heads=3, window=70, pattern="w"),
    "all": replace(
        LLAMA, heads=6, key_heads=3, blocks=4, window=9, pattern="fwn", score_cap=3.0, rotary_scaling="linear",
        rotary_factor=2.0, rotary_share=0.5,
    ),
    "shared by 30": replace(LLAMA, heads=30, key_heads=1, head_width=2, mlp="gelu", norm="layer"),
}  # fmt: skip
GREEDY = Sampling(temperature=0)


def model_of(config: ModelConfig) -> GPT:
    model = GPT(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def ending(prompt: list[int], sampling: Sampling = GREEDY) -> Ending:
    return Ending(prompt, sampling, torch.Generator().manual_seed(1), frozenset(), True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_scores_are_as_near_to_float64_as_those_of_torch(name: str, kind: str) -> None:
    model = model_of(MODELS[name])
    tokens = torch.randint(MODELS[name].vocab_size, (2, 140))
    with torch.no_grad():
        own = model.logits(model(tokens))
        exact = model.double().logits(model(tokens))
        model.float()
        if kind == "bf16":
            model.compute_dtype = torch.bfloat16
            own = model.logits(model(tokens))
    model.decode_int8 = kind == "int8"
    decoder = NativeDecoder(model, slots=4, most_read=256)
    first, second = tokens.tolist()
    # A prompt in three parts, the other in one, which ends beside the middle part; then each on by known tokens.
    decoder.step(0, [Reading(first[:50], 2, 0, None)])
    decoder.step(0, [Reading(first[50:100], 2, 50, None), Reading(second[:130], 0, 0, ending(second[:130]))])
    found = {(1, 129): decoder.scores(1)[0].clone()}
    for position in range(130, 140):
        reading = [Reading(first[100:137], 2, 100, ending(first[:137]))] if position == 137 else []
        decoder.rows.tokens[0] = second[position]
        if position > 137:
            decoder.rows.tokens[1] = first[position - 1]
        tokens_chosen, logprobs = decoder.step(2 if position > 137 else 1, reading)
        rows = [(1, position)] + ([(0, position - 1)] if position >= 137 else [])
        scores = decoder.scores(len(rows)).clone()
        assert tokens_chosen[0].tolist() == scores.argmax(-1).tolist()
        expected = scores.double().log_softmax(-1).gather(-1, scores.argmax(-1, keepdim=True))[:, 0]
        assert logprobs[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        found |= dict(zip(rows, scores, strict=True))
    assert len(found) == 14
    worst = max(float((score.double() - exact[key]).abs().max()) for key, score in found.items())
    torchs = max(float((own[key].double() - exact[key]).abs().max()) for key in found)
    assert worst <= {"fp32": 2 * torchs + 1e-6, "bf16": 2 * torchs, "int8": 0.03 * float(exact.abs().max())}[kind]


@pytest.mark.parametrize("name", ["ours", "Qwen3"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_a_row_has_the_same_bits_alone_among_others_in_many_turns_and_by_two_threads(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(MODELS[name])
    model.decode_int8, model.compute_dtype = kind == "int8", torch.bfloat16 if kind == "bf16" else None
    draws = random.Random(0)
    prompts = [[draws.randrange(333) for _ in range(draws.randrange(1, 90))] for _ in range(9)]
    settings = Sampling(0.8, top_p=0.9)

    def run(chosen: list[int], turns: int, members: int) -> dict[int, tuple[list[int], bytes]]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: members)
        decoder = NativeDecoder(model, slots=9, most_read=900, most_turns=turns)
        decoder.work = 10**9  # as if it were worth the threads' while
        reading = [Reading(prompts[each], each, 0, ending(prompts[each], settings)) for each in chosen]
        tokens, bits = [decoder.step(0, reading)[0].copy()], decoder.scores(len(chosen)).numpy().copy()
        for _ in range(24 // turns):
            tokens.append(decoder.step(len(chosen), (), turns)[0].copy())
        whole = np.concatenate(tokens)
        return {each: (whole[:, row].tolist(), bits[row].tobytes()) for row, each in enumerate(chosen)}

    together = run(list(range(9)), 1, 1)
    assert run(list(range(9)), 8, 2) == together
    for each in (0, 4, 8):
        # Two threads share the heads of queries that have the same head of keys.
        assert run([each], 12, 1) == run([each], 12, 2) == {each: together[each]}


def test_turns_end_where_a_row_stops() -> None:
    model = model_of(OURS)
    settings = Sampling(seed=3)
    free = alone(model, Request([5, 6], settings, 30))
    stop = next(token for token in free[3:] if token not in free[:3])
    other = alone(model, Request([7], settings, 30))
    batcher = Batcher(model, slots=2)
    numbers = [
        batcher.submit(Request([5, 6], settings, 30, stop_ids=frozenset([stop, 1000]))),
        batcher.submit(Request([7], settings, 30)),
    ]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    ends: dict[int, str | None] = {}
    while not batcher.idle:
        for step in batcher.step():
            found[step.request].append(step.token)
            ends[step.request] = step.finish
    assert found[numbers[0]] == free[: free.index(stop) + 1] and found[numbers[1]] == other
    assert list(ends.values()) == ["stop", "length"]


def alone(model: GPT, request: Request) -> list[int]:
    batcher = Batcher(model, slots=1)
    batcher.submit(request)
    tokens = []
    while not batcher.idle:
        tokens += [step.token for step in batcher.step()]
    return tokens


def test_a_seed_gives_what_it_gives_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(OURS)
    requests = [
        Request([1, 2, 3], Sampling(0.8, seed=5), 130, top_logprobs=0),
        Request([4], Sampling(top_p=0.8, repetition_penalty=1.3, seed=6), 100),
        Request([9] * 70, Sampling(top_k=9, min_p=0.05, seed=7), 80),
        Request([9, 8], Sampling(temperature=0, repetition_penalty=1.2), 60),
        Request([3], Sampling(seed=2), 20, top_logprobs=3),
        Request([6] * 40, Sampling(seed=8, presence_penalty=1.5, frequency_penalty=0.3), 90),
        Request([7], Sampling(0, frequency_penalty=1.2, logit_bias=((9, 2.0), (7, -100))), 60),
        Request([2], Sampling(0.9, top_p=0.9, repetition_penalty=1.1, presence_penalty=-1, seed=1), 90),
        Request([5, 1], Sampling(top_k=30, logit_bias=((4, 100.0), (8, 100.0)), seed=4), 30, top_logprobs=1),
    ]

    def run() -> tuple[dict[int, list[int]], list[tuple[float, list[int]]]]:
        batcher = Batcher(model, slots=3, chunk=16)
        found: dict[int, list[int]] = {batcher.submit(each): [] for each in requests}
        named = []
        while not batcher.idle:
            for step in batcher.step():
                found[step.request].append(step.token)
                if step.logprob is not None:
                    named.append((step.request, step.logprob, [token for token, _ in step.top]))
        return found, [each[1:] for each in sorted(named, key=lambda each: each[0])]

    tokens, named = run()
    monkeypatch.setenv("GPT_KERNELS", "torch")
    expected, expected_named = run()
    assert tokens == expected
    assert [top for _, top in named] == [top for _, top in expected_named]
    assert [value for value, _ in named] == pytest.approx([value for value, _ in expected_named], abs=1e-5)


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_what_begins_anew_counts_what_it_had_generated(monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setenv("GPT_KERNELS", kernels)
    model, settings = model_of(OURS), Sampling(0, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((9, 1.0),))
    requests = [Request([token], settings, 40) for token in (9, 5)]
    batcher = Batcher(model, slots=2)
    found: dict[int, list[int]] = {batcher.submit(each): [] for each in requests}
    for steps in range(1, 200):
        failed = steps % 7 == 2 and len(batcher.running) == 2
        for step in [*batcher.step(), *(batcher.recover() if failed else [])]:
            found[step.request].append(step.token)
    assert list(found.values()) == [alone(model, each) for each in requests]


def test_two_threads_may_decode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(OURS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = alone(model, Request([5, 6], GREEDY, 40))
    found: list[list[int]] = []

    def work() -> None:
        decoder = Batcher(model, slots=1)
        assert decoder.native is not None
        decoder.native.work = 10**9  # both want the team
        for _ in range(5):
            decoder.submit(Request([5, 6], GREEDY, 40))
            tokens = []
            while not decoder.idle:
                tokens += [step.token for step in decoder.step()]
            found.append(tokens)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 10


def test_ctrl_c_before_the_caller_begins_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(OURS)
    expected = alone(model, Request([5, 6], GREEDY, 40))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    batcher, results = Batcher(model, slots=1), SimpleQueue[int]()
    assert batcher.native is not None
    batcher.native.work, right = 10**9, compiled.step

    def interrupted(*arguments: Any) -> int:
        if arguments[-2] == 0:
            raise KeyboardInterrupt
        results.put(right(*arguments))
        return 0

    batcher.submit(Request([5, 6], GREEDY, 40))
    with monkeypatch.context() as patched:
        patched.setattr(native, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batcher.step()
        assert results.get(timeout=60) == 0
    assert batcher.recover() == [Step(0, -1, "error")]
    batcher.submit(Request([5, 6], GREEDY, 40))
    found = []
    while not batcher.idle:
        found += [step.token for step in batcher.step()]
    assert found == expected


def test_where_it_cannot_run_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, device = model_of(OURS), torch.device("cpu")
    assert Batcher(model, slots=1).native is not None
    assert cpu.why_not(device, torch.float64) == "torch.float64 on cpu"
    assert Batcher(GPT(OURS).double(), slots=1).native is None
    model.decode_int8 = True
    with pytest.raises(InputError, match="neither ahead nor as a graph"):
        Batcher(model, slots=1, ahead=True)
    model.decode_int8 = False
    monkeypatch.setenv("GPT_KERNELS", "torch")
    assert cpu.why_not(device, torch.float32) == "GPT_KERNELS is torch"
    assert Batcher(model, slots=1).native is None
    model.decode_int8 = True
    with pytest.raises(InputError, match="int8 cannot be used: GPT_KERNELS is torch"):
        Batcher(model, slots=1)

"""Requests that come, go and are cancelled at any step; none notices the others."""

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch

from engine.batcher import Batcher, QueueFullError, Request, Step, read_prompt
from engine.decoders import DecodeGraphs
from engine.errors import InputError
from engine.model import GPT, NoRoomError
from engine.sampling import Sampling

GREEDY = Sampling(0.0)
ADDED = Sampling(presence_penalty=0.7, frequency_penalty=-0.4, logit_bias=((7, 3.0),), seed=3)
SAMPLINGS = (GREEDY, Sampling(0.8, seed=1), Sampling(repetition_penalty=1.5, top_k=20, seed=2), ADDED)


def request(seed: int, **options: object) -> Request:
    generator = random.Random(seed)
    prompt = [generator.randrange(300) for _ in range(generator.randint(1, 40))]
    return Request(prompt, SAMPLINGS[seed % len(SAMPLINGS)], generator.randint(1, 12), **options)  # type: ignore[arg-type]


def drain(batcher: Batcher) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = {}
    while not batcher.idle:
        for step in batcher.step():
            found.setdefault(step.request, []).append(step)
    return found


def alone(gpt: GPT, request: Request) -> list[int]:
    batcher = Batcher(gpt, slots=1)
    number = batcher.submit(request)
    return [step.token for step in drain(batcher)[number]]


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph would replay is run: the padding, which changes nothing, is the same."""
    monkeypatch.setattr(DecodeGraphs, "replay", DecodeGraphs.run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("ahead", "graphs"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("slots", "chunk"), [(1, 256), (3, 7), (8, 16), (8, 100_000)])
def test_what_a_request_gets_does_not_depend_on_who_else_is_there(
    gpt: GPT, eager_graphs: None, slots: int, chunk: int, ahead: bool, graphs: bool, dtype: torch.dtype
) -> None:
    gpt.to(dtype)
    requests = [request(seed) for seed in range(14)]
    batcher = Batcher(gpt, slots=slots, chunk=chunk, ahead=ahead, graphs=graphs)
    found: dict[int, list[int]] = {}
    coming, numbers = list(requests), {}
    # They come one or two at a time, while others are under way.
    while coming or not batcher.idle:
        for each in coming[: 1 + len(coming) % 2]:
            numbers[batcher.submit(each)] = coming.pop(0)
        for step in [*batcher.step(), *batcher.step()]:
            found.setdefault(step.request, []).append(step.token)
    for number, each in numbers.items():
        assert found[number] == alone(gpt, each), each


def test_a_cancelled_request_frees_its_slot_for_the_next_step(gpt: GPT) -> None:
    batcher = Batcher(gpt, slots=2)
    long = [batcher.submit(Request([1, 2], GREEDY, 40)) for _ in range(2)]
    last = batcher.submit(Request([3], GREEDY, 5))
    batcher.step()
    batcher.step()
    assert all(step.request in long for step in batcher.step())
    batcher.cancel(long[0])
    assert {step.request for step in batcher.step()} == {long[1], last}
    batcher.cancel(last)
    batcher.cancel(12345)
    assert set(drain(batcher)) == {long[1]}


def test_cancelling_changes_nothing_for_the_others(gpt: GPT) -> None:
    gpt.double()
    requests = [request(seed) for seed in range(6)]
    batcher = Batcher(gpt, slots=6, chunk=8)
    numbers = [batcher.submit(each) for each in requests]
    found: dict[int, list[int]] = {}
    while not batcher.idle:
        for step in batcher.step():
            found.setdefault(step.request, []).append(step.token)
        for victim in (numbers[0], numbers[3]):
            batcher.cancel(victim)
    for number, each in zip(numbers, requests, strict=True):
        if number not in (numbers[0], numbers[3]):
            assert found[number] == alone(gpt, each)


def test_ahead_of_the_host_what_comes_after_an_end_is_for_nobody(gpt: GPT) -> None:
    tokens = alone(gpt, Request([5, 6], GREEDY, 10))
    batcher = Batcher(gpt, slots=2, ahead=True)
    stopped = batcher.submit(Request([5, 6], GREEDY, 10, stop_ids=frozenset([tokens[0]])))
    cancelled = batcher.submit(Request([5, 6], GREEDY, 10))
    assert batcher.step() == []  # under way
    assert [(step.request, step.finish) for step in batcher.step()] == [(stopped, "stop"), (cancelled, None)]
    batcher.cancel(cancelled)
    assert drain(batcher) == {} and not batcher.running


def recovering(batcher: Batcher) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = {}
    for _ in range(5000):
        if batcher.idle:
            return found
        try:
            steps = batcher.step()
        except MemoryError:
            steps = batcher.recover()
        for step in steps:
            found.setdefault(step.request, []).append(step)
    raise AssertionError("it never ended")


WAYS = pytest.mark.parametrize(("ahead", "graphs"), [(False, False), (True, False), (True, True)])


@WAYS
@pytest.mark.parametrize("good", [0, 1, 5])
def test_a_request_that_makes_a_step_fail_fails_alone(
    gpt: GPT, eager_graphs: None, monkeypatch: pytest.MonkeyPatch, ahead: bool, graphs: bool, good: int
) -> None:
    gpt.double()
    requests = [request(seed) for seed in range(12)]
    bad = [Request([7] * 20, SAMPLINGS[1], 12), Request([8] * 31, GREEDY, 12)]
    choose = Batcher._choose

    def failing(self: Batcher, logits: Any, first: int, chosen: list[Any]) -> Any:
        # What the step has written is in the cache by now, and what it draws is drawn.
        result = choose(self, logits, first, chosen)
        for each, one in itertools.product(chosen, bad):
            length = len(each.request.prompt) + each.produced
            if each.request.prompt[:20] == one.prompt[:20] and length > len(one.prompt) + good:
                raise MemoryError
        return result

    wanted = [alone(gpt, each) for each in [*requests, *bad]]
    monkeypatch.setattr(Batcher, "_choose", failing)
    batcher = Batcher(gpt, slots=6, chunk=16, ahead=ahead, graphs=graphs)
    numbers = [batcher.submit(each) for each in [*requests[:6], bad[0], *requests[6:], bad[1]]]
    found = recovering(batcher)
    order = [*range(6), 12, *range(6, 12), 13]
    for number, index in zip(numbers, order, strict=True):
        tokens = [step.token for step in found[number]]
        if index < 12:
            assert tokens == wanted[index], requests[index]
        else:
            # Ahead of the host, its last good token is still under way.
            assert tokens[-1] == -1 and found[number][-1].finish == "error"
            assert tokens[:-1] in (wanted[index][:good], wanted[index][: good - ahead])


@WAYS
@pytest.mark.parametrize("what", ["model", "decoder", "choose", "swap"])
def test_after_a_step_that_failed_once_everyone_goes_on(
    gpt: GPT, eager_graphs: None, monkeypatch: pytest.MonkeyPatch, ahead: bool, graphs: bool, what: str
) -> None:
    gpt.double()
    requests = [request(seed) for seed in range(10)]
    wanted = [alone(gpt, each) for each in requests]
    batcher = Batcher(gpt, slots=5, chunk=16, ahead=ahead, graphs=graphs)
    numbers = [batcher.submit(each) for each in requests]
    draws = random.Random(what)
    owner: Any = {"model": gpt, "decoder": batcher.decoder, "choose": batcher, "swap": batcher.cache}[what]
    name = {"model": "forward", "decoder": "logits", "choose": "_choose", "swap": "swap"}[what]
    right = getattr(owner, name)

    def failing(*given: Any, **options: Any) -> Any:
        result = right(*given, **options)
        # The probe, which reads no cache, is right.
        if len(batcher.running) > 1 and (what != "model" or options) and draws.random() < 0.2:
            raise MemoryError
        return result

    monkeypatch.setattr(owner, name, failing)
    found = recovering(batcher)
    assert [[step.token for step in found[number]] for number in numbers] == wanted


def test_where_memory_is_short_fewer_run_at_once(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt.double()
    requests = [request(seed) for seed in range(16)]
    wanted = [alone(gpt, each) for each in requests]
    batcher = Batcher(gpt, slots=8)
    numbers = [batcher.submit(each) for each in requests]
    logits, failures = batcher.decoder.logits, []

    def failing(rows: int, reach: int) -> Any:
        if rows > 3:
            failures.append(rows)
            raise MemoryError
        return logits(rows, reach)

    monkeypatch.setattr(batcher.decoder, "logits", failing)
    found = recovering(batcher)
    assert [[step.token for step in found[number]] for number in numbers] == wanted
    assert 0 < len(failures) < 5


def test_who_is_cancelled_after_a_failure_gets_no_more(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = Batcher(gpt, slots=4)
    numbers = [batcher.submit(Request([each], GREEDY, 5)) for each in range(1, 5)]
    batcher.step()
    assert batcher.recover() == [] and not batcher.idle
    batcher.cancel(numbers[0])
    assert set(drain(batcher)) == set(numbers[1:])


def test_a_broken_device_is_said_and_not_tried_again(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_KERNELS", "torch")  # what is compiled does not go through the model
    batcher = Batcher(gpt, slots=4)
    batcher.submit(Request([1], GREEDY, 5))

    def broken(*given: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(gpt, "forward", broken)
    for call in (batcher.step, batcher.recover):
        with pytest.raises(MemoryError):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_graphs_and_running_ahead_change_nothing(gpt: GPT) -> None:
    gpt.cuda()
    requests = [request(seed) for seed in range(14)]
    found = []
    for graphs, ahead in ((False, False), (True, True)):
        batcher = Batcher(gpt, slots=6, chunk=16, graphs=graphs, ahead=ahead)
        for each in requests:
            batcher.submit(each)
        found.append({number: [step.token for step in steps] for number, steps in drain(batcher).items()})
    assert found[0] == found[1]


def test_a_long_prompt_does_not_stall_the_others(gpt: GPT) -> None:
    batcher = Batcher(gpt, slots=2, chunk=4)
    short = batcher.submit(Request([1], GREEDY, 40))
    batcher.step()
    batcher.submit(Request([2] * 40, GREEDY, 5))
    # Ten chunks of four: at every one of these steps the other sequence moves on.
    for _ in range(9):
        assert [step.request for step in batcher.step()] == [short]
    assert len(batcher.step()) == 2


def test_it_ends_at_a_stop_id_at_the_limit_and_at_the_context(gpt: GPT) -> None:
    tokens = alone(gpt, Request([5, 6], GREEDY, 10))
    batcher = Batcher(gpt)
    stopped = batcher.submit(Request([5, 6], GREEDY, 10, stop_ids=frozenset([tokens[3]])))
    limited = batcher.submit(Request([5, 6], GREEDY, 4))
    full = batcher.submit(Request([5] * 45, GREEDY, 10))
    found = drain(batcher)
    first = tokens.index(tokens[3])
    assert [step.token for step in found[stopped]] == tokens[: first + 1]
    assert [step.finish for step in found[stopped]] == [None] * first + ["stop"]
    assert [step.token for step in found[limited]] == tokens[:4] and found[limited][-1].finish == "length"
    assert len(found[full]) == 3 and found[full][-1].finish == "length"


@pytest.mark.parametrize("ahead", [False, True])
def test_log_probabilities_are_those_of_the_model(gpt: GPT, ahead: bool) -> None:
    batcher = Batcher(gpt, ahead=ahead)
    prompt = [1, 2, 3]
    changed = Sampling(0.7, repetition_penalty=1.5, presence_penalty=1, logit_bias=((9, 4.0),), seed=5)
    number = batcher.submit(Request(prompt, changed, 6, top_logprobs=3))
    steps = drain(batcher)[number]
    with torch.no_grad():
        for step in steps:
            expected = gpt.logits(gpt(torch.tensor([prompt])))[0, -1].log_softmax(-1)
            assert step.logprob == pytest.approx(expected[step.token].item(), abs=1e-4)
            assert [token for token, _ in step.top] == expected.topk(3).indices.tolist()
            prompt = [*prompt, step.token]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_in_bf16_scores_are_fp32_from_the_last_product_on(
    gpt: GPT, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    gpt.to(stored).compute_dtype = torch.bfloat16
    seen: list[torch.Tensor] = []

    def choose(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append(logits.clone())
        return logits.argmax(-1)

    monkeypatch.setenv("GPT_KERNELS", "torch")
    monkeypatch.setattr("engine.batcher.choose", choose)
    batcher = Batcher(gpt, slots=1)
    batcher.submit(Request([5, 6, 7], GREEDY, 3))
    while not batcher.idle:
        batcher.step()
    assert len(seen) == 3
    for logits in seen:
        assert logits.dtype == torch.float32 and (logits != logits.bfloat16()).float().mean() > 0.9
    with torch.no_grad():
        hidden = gpt(torch.tensor([[5, 6, 7]]))[0, -1]
        exact = hidden.float() @ gpt.head_weight.bfloat16().float().T
        torch.testing.assert_close(gpt.logits(hidden), exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(seen[0][0].log_softmax(-1), exact.log_softmax(-1), rtol=0, atol=1e-3)


def test_a_prompt_is_read_as_if_its_tokens_had_been_chosen(gpt: GPT) -> None:
    prompt = alone(gpt, Request([1], GREEDY, 6))
    batcher = Batcher(gpt)
    batcher.submit(Request(prompt[:1], GREEDY, 1, top_logprobs=2))
    (expected,) = batcher.step()
    first, second, *_, last = read_prompt(gpt, prompt, 2)
    assert (first.token, first.logprob, first.top) == (prompt[0], None, ()) and last.token == prompt[-1]
    assert second.token == prompt[1] and [token for token, _ in second.top] == [token for token, _ in expected.top]
    assert second.top[0][1] == pytest.approx(expected.top[0][1], abs=1e-4)
    assert len(read_prompt(gpt, [1], 2)) == 1


def test_the_queue_is_bounded_and_prompts_are_checked(gpt: GPT) -> None:
    batcher = Batcher(gpt, slots=1, queue=2)
    for _ in range(2):
        batcher.submit(Request([1], GREEDY, 3))
    with pytest.raises(QueueFullError):
        batcher.submit(Request([1], GREEDY, 3))
    batcher.step()
    batcher.submit(Request([1], GREEDY, 3))
    for prompt, limit, message in (([], 3, "empty"), ([1] * 48, 3, "holds 48"), ([1], 0, "max_tokens")):
        with pytest.raises(InputError, match=message):
            batcher.submit(Request(prompt, GREEDY, limit))
    for token in (-1, gpt.config.vocab_size):
        with pytest.raises(InputError, match=f"logit_bias names token {token}; this model's tokens are 0 to"):
            batcher.submit(Request([1], Sampling(logit_bias=((3, 1.0), (token, 1.0))), 3))


def test_a_batcher_has_no_more_slots_than_memory_has_room_for(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(slots: int) -> int:
        return Batcher.fitting(gpt, slots, 8).slots

    config = gpt.config
    monkeypatch.setenv("GPT_KERNELS", "torch")
    each = 2 * 4 * config.blocks * config.width * (2 * config.context)
    monkeypatch.setattr("engine.model.free_memory", lambda device: 5 * each)
    assert [made(slots) for slots in (4, 5, 6, 64)] == [4, 5, 2, 2]
    monkeypatch.setattr("engine.model.free_memory", lambda device: each - 1)
    with pytest.raises(NoRoomError, match="there is room for 0"):
        made(1)


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_a_short_text_needs_no_cache_for_a_long_context(
    gpt: GPT, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_KERNELS", kernels)
    config = dataclasses.replace(gpt.config, context=131_072)
    long = GPT(config).eval()
    long.load_state_dict(gpt.state_dict())
    asked = Request([5] * 20, Sampling(0.8, seed=1), 12)
    batcher = Batcher.fitting(long, 1, 1, 32)
    held = batcher.cache.memory.numel() if batcher.native is None else batcher.native.cache.keys.size
    assert batcher.capacity == 32 and held < 2 * config.blocks * config.width * (64 + 32)
    number = batcher.submit(asked)
    assert [step.token for step in drain(batcher)[number]] == alone(gpt, asked)
    with pytest.raises(InputError, match="the prompt has 40 tokens; its cache holds 32, answer included"):
        batcher.submit(Request([5] * 40, GREEDY, 3))

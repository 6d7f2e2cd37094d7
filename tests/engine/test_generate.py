"""Generation: the cache changes nothing, every sequence minds its own business, and text comes in whole characters."""

import codecs
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import InputError
from engine.generate import Completion, TextStream, document_prompt, generate, stream
from engine.model import GPT
from engine.sampling import Past, Sampling, penalise
from engine.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)
SMILE = "\U0001f600"


def prompts(tokenizer: Tokenizer, *texts: str) -> list[list[int]]:
    return [document_prompt(tokenizer, text) for text in texts]


@torch.no_grad()
def naive(model: GPT, eod: int, prompt: Sequence[int], sampling: Sampling, max_tokens: int) -> list[int]:
    """Greedy continuation without a cache: the whole text is read again for each token."""
    ids = list(prompt)
    while len(ids) < min(model.config.context, len(prompt) + max_tokens):
        logits = model.logits(model(torch.tensor([ids])))[:, -1]
        seen, new = torch.zeros_like(logits, dtype=torch.uint8), torch.tensor(ids[len(prompt) :], dtype=torch.int64)
        seen[0, ids] = 1
        counts = new.bincount(minlength=logits.shape[1])
        added = -sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
        for biased, bias in sampling.logit_bias:
            added[biased] += bias
        token = int(penalise(logits, sampling, Past(seen, added[None])).argmax())
        if token == eod:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "penalties",
    [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": ((99, 1.5),)},
    ],
    ids=["none", "repetition", "all"],
)
@pytest.mark.parametrize("max_tokens", [1, 20, None])
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_greedy_cached_output_equals_the_naive_one_token_for_token(
    gpt: GPT, tokenizer: Tokenizer, penalties: dict[str, Any], max_tokens: int | None, dtype: torch.dtype | None
) -> None:
    if dtype is not None:
        gpt.to(dtype)
    sampling = Sampling(temperature=0, **penalties)
    batch = prompts(tokenizer, "Once upon a time", "", "The fox was brave, and", "Tim wanted to build a boat.")
    batch.append([tokenizer.eod] * (gpt.config.context - 1))
    assert len({len(prompt) for prompt in batch}) >= 4
    completions = generate(gpt, tokenizer, batch, sampling, max_tokens=max_tokens)
    for prompt, completion in zip(batch, completions, strict=True):
        expected = naive(gpt, tokenizer.eod, prompt, sampling, max_tokens or gpt.config.context)
        assert list(completion.ids) == expected
        whole_characters = codecs.getincrementaldecoder("utf-8")("replace").decode(tokenizer.bytes_of(expected))
        assert completion.text == whole_characters


def test_the_model_is_left_in_the_mode_it_was_in(gpt: GPT, tokenizer: Tokenizer) -> None:
    for training in (True, False):
        gpt.train(training)
        generate(gpt, tokenizer, prompts(tokenizer, "Once"), GREEDY, max_tokens=2)
        assert gpt.training == training


def test_it_runs_in_bf16_on_fp32_parameters_and_on_bf16_parameters(gpt: GPT, tokenizer: Tokenizer) -> None:
    gpt.compute_dtype = torch.bfloat16
    first = generate(gpt, tokenizer, prompts(tokenizer, "Once", "The fox"), GREEDY, max_tokens=5)
    gpt.compute_dtype = None
    assert generate(gpt.bfloat16(), tokenizer, prompts(tokenizer, "Once", "The fox"), GREEDY, max_tokens=5) == first


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(gpt: GPT, tokenizer: Tokenizer) -> None:
    sampling = Sampling(temperature=1.5, seed=11)
    first, *others = prompts(tokenizer, "Once upon a", "Tim", "The little fox who lived in a wood", "")
    alone = generate(gpt, tokenizer, [first], sampling, max_tokens=25)[0]
    assert generate(gpt, tokenizer, [first], sampling, max_tokens=25)[0] == alone
    for company in ([first], others, list(reversed(others)), [*others, first]):
        assert generate(gpt, tokenizer, [first, *company], sampling, max_tokens=25)[0] == alone
    assert generate(gpt, tokenizer, [first], Sampling(temperature=1.5, seed=12), max_tokens=25)[0] != alone
    twins = generate(gpt, tokenizer, [first, first], sampling, max_tokens=25)
    assert twins[0] != twins[1]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, "prompt 1: the prompt is empty"), (48, "prompt 1: the prompt has 48 tokens.*holds 48"), (60, "60 tokens")],
)
def test_a_prompt_that_is_empty_or_leaves_no_room_is_refused(
    gpt: GPT, tokenizer: Tokenizer, length: int, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        generate(gpt, tokenizer, [[1, 2], [tokenizer.eod] * length], GREEDY)


def test_max_tokens_below_one_is_refused_and_no_prompts_give_no_completions(gpt: GPT, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="max_tokens is 0"):
        generate(gpt, tokenizer, [[1]], GREEDY, max_tokens=0)
    assert generate(gpt, tokenizer, [], GREEDY) == []


class Script:
    """Stands in for the model: the tokens that each sequence of a batch is to produce, one list per sequence."""

    def __init__(self, gpt: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpt, self.tokenizer, self.monkeypatch = gpt, tokenizer, monkeypatch

    def play(self, *sequences: Sequence[int], **options: Any) -> tuple[list[Completion], list[list[str]]]:
        """The completions, and the text of each chunk that was streamed."""

        # Each sequence has a generator of its own, and they begin in their order. What a sequence would write after its
        # end must not be heard of.
        scripts: dict[torch.Generator, Iterator[int]] = {}

        def choose(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], seen: object) -> Tensor:
            for generator in generators:
                script = sequences[len(scripts) % len(sequences)]
                scripts.setdefault(generator, itertools.chain(script, itertools.repeat(script[-1])))
            return torch.tensor([next(scripts[generator]) for generator in generators])

        self.monkeypatch.setenv("GPT_KERNELS", "torch")  # the native step chooses by itself
        self.monkeypatch.setattr("engine.batcher.choose", choose)
        arguments = (self.gpt, self.tokenizer, [[self.tokenizer.eod]] * len(sequences), GREEDY)
        chunks: list[list[str]] = [[] for _ in sequences]
        for chunk in stream(*arguments, **options):
            chunks[chunk.index].append(chunk.text)
        return generate(*arguments, **options), chunks


@pytest.fixture
def script(gpt: GPT, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(gpt, tokenizer, monkeypatch)


def test_the_end_of_a_document_stops_its_sequence_alone(script: Script) -> None:
    fox, owl = script.tokenizer.encode("the fox"), script.tokenizer.encode("a very small owl sat")
    completions, _ = script.play([*fox, script.tokenizer.eod], owl, max_tokens=len(owl))
    assert completions == [
        Completion("the fox", tuple(fox), "stop"),
        Completion("a very small owl sat", tuple(owl), "length"),
    ]


def test_a_sequence_ends_at_max_tokens_and_at_the_context(script: Script) -> None:
    ids = script.tokenizer.encode("fox " * 60)
    completions, _ = script.play(ids, max_tokens=3)
    assert (completions[0].ids, completions[0].finish) == (tuple(ids[:3]), "length")
    completions, _ = script.play(ids)
    assert len(completions[0].ids) == script.gpt.config.context - 1 and completions[0].finish == "length"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three"], "one two "),
        ("one two three", ["one"], ""),
        ("one two three", ["e t", "two t", "o three"], "on"),
        ("one two three", ["three", "tw"], "one "),
        ("aab aaab", ["aaab"], "aab "),
        (f"say {SMILE} now", [SMILE], "say "),
        (f"say {SMILE}", [SMILE], "say "),
        ("line\nline\n\nend", ["\n\n"], "line\nline"),
    ],
)
def test_text_ends_before_a_stop_string_wherever_its_tokens_end(
    script: Script, text: str, stop: list[str], expected: str
) -> None:
    ids = script.tokenizer.encode(text)
    for options in ({}, {"max_tokens": len(ids)}):
        completions, chunks = script.play([*ids, script.tokenizer.eod], stop=stop, **options)
        assert (completions[0].text, completions[0].finish) == (expected, "stop")
        assert "".join(chunks[0]) == expected


@pytest.mark.parametrize(("text", "stop"), [("one two thr", ["three"]), ("one", ["one more"]), ("one", ["", "two"])])
def test_what_might_have_become_a_stop_string_is_not_lost_at_the_end(
    script: Script, text: str, stop: list[str]
) -> None:
    ids = script.tokenizer.encode(text)
    for sequence, options, finish in (
        ([*ids, script.tokenizer.eod], {}, "stop"),
        (ids, {"max_tokens": len(ids)}, "length"),
    ):
        completions, chunks = script.play(sequence, stop=stop, **options)
        assert (completions[0].text, completions[0].finish) == (text, finish)
        assert "".join(chunks[0]) == text


def test_a_stop_string_stops_its_own_sequence_alone(script: Script) -> None:
    first, second = script.tokenizer.encode("one two three four"), script.tokenizer.encode("three one three one")
    completions, _ = script.play(first, second, max_tokens=len(second), stop=["two"])
    assert completions[0].text == "one " and completions[0].finish == "stop"
    assert completions[1].text.startswith("three") and completions[1].finish == "length"


@given(text=st.text(min_size=1, max_size=20), stop=st.lists(st.text(max_size=3), max_size=2))
def test_streamed_chunks_are_whole_characters_and_join_to_the_text(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    ids = tokenizer.encode(text)
    streamer = TextStream(tokenizer, stop)
    chunks = [streamer.push(token, last=place == len(ids) - 1) for place, token in enumerate(ids)]
    found = [place for each in stop if each and (place := text.find(each)) >= 0]
    assert "".join(chunks) == text[: min(found, default=len(text))]
    assert streamer.stopped == bool(found)
    for chunk in chunks:
        chunk.encode()


@pytest.mark.parametrize("character", [SMILE, "\u4e16", "\u00df", "\U0001f468\u200d\U0001f469"])
def test_a_character_split_over_tokens_comes_in_one_chunk(script: Script, character: str) -> None:
    ids = script.tokenizer.encode(f"a {character}{character}")
    assert len(ids) > 4
    completions, chunks = script.play([*ids, script.tokenizer.eod])
    assert completions[0].text == "".join(chunks[0]) == f"a {character}{character}"
    assert not any("\ufffd" in chunk for chunk in chunks[0])


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_character_cut_in_half_by_the_end_is_left_out(script: Script, cut: int, finish: str) -> None:
    ids = script.tokenizer.encode(f"fox {SMILE}")[: cut - 4]
    sequence, options = ([*ids, script.tokenizer.eod], {}) if finish == "stop" else (ids, {"max_tokens": len(ids)})
    completions, chunks = script.play(sequence, **options)
    assert completions[0].text == "".join(chunks[0]) == "fox "
    assert completions[0].ids == tuple(ids) and completions[0].finish == finish


def test_bytes_that_are_no_text_become_replacement_characters(script: Script) -> None:
    broken = script.tokenizer.encode(SMILE)[:2] + script.tokenizer.encode("fox")
    completions, _ = script.play([*broken, script.tokenizer.eod])
    assert completions[0].text == "\ufffdfox"


def test_a_sequence_ends_at_the_ids_that_are_given(gpt: GPT, tokenizer: Tokenizer) -> None:
    (prompt,) = prompts(tokenizer, "Once upon a time")
    (whole,) = generate(gpt, tokenizer, [prompt], GREEDY, max_tokens=6)
    ends = frozenset(whole.ids[3:4])
    chunks = list(stream(gpt, tokenizer, [prompt], GREEDY, max_tokens=6, stop_ids=ends))
    before = [token for token in whole.ids[:4] if token not in ends]
    assert [token for chunk in chunks for token in chunk.ids] == before[: len(chunks) - 1]
    assert chunks[-1].finish == "stop" and chunks[-1].ids == ()

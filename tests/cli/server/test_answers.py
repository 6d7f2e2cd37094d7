"""Every field of the OpenAI API that is obeyed, through OpenAI's own client."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch

from cli.server.answers import Choice
from engine import chat_template
from engine.batcher import Step
from engine.generate import document_prompt, generate
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from tests.cli.server.conftest import CONTEXT, Live

PROMPT = "The fox was"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brave."}, {"role": "user", "content": "Where is my hat?"}]


def alone(server: Live, prompt: list[int], **options: Any) -> str:
    """What the engine itself writes."""
    max_tokens = options.pop("max_tokens", None)
    model, sampling = server.worker.batcher.model, Sampling(**options)
    return generate(model, server.served.tokenizer, [prompt], sampling, max_tokens=max_tokens)[0].text


def complete(server: Live, **options: Any) -> Any:
    return server.openai.completions.create(**{"model": "small", "prompt": PROMPT, "seed": 1, **options})


def chat(server: Live, **options: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": "small", "messages": MESSAGES, "seed": 1, **options})


def test_a_completion_has_every_field_and_the_text_of_the_engine(server: Live) -> None:
    answer = complete(server)
    prompt = document_prompt(server.served.tokenizer, PROMPT)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "small"
    assert abs(answer.created - time.time()) < 100
    (choice,) = answer.choices
    assert choice.text == alone(server, prompt, seed=1, max_tokens=16)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 16, len(prompt) + 16)


def test_a_chat_has_every_field_and_goes_on_to_the_context(server: Live) -> None:
    answer = chat(server)
    messages = [chat_template.Message(each["role"], each["content"]) for each in MESSAGES]
    prompt = chat_template.answer_prompt(server.served.tokenizer, messages)
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.refusal is None
    assert choice.message.content == alone(server, prompt, seed=1)
    assert choice.finish_reason == "length" and answer.usage.total_tokens == CONTEXT


def test_content_may_be_parts_and_the_developer_is_the_system(server: Live) -> None:
    parts = [{"type": "text", "text": "Where is "}, {"type": "text", "text": "my hat?"}]
    messages = [{"role": "developer", "content": "Be brave."}, {"role": "user", "content": parts}]
    assert chat(server, messages=messages).choices == chat(server).choices


def test_an_answer_of_ours_may_be_sent_back_as_it_came(server: Live) -> None:
    message = chat(server, max_tokens=3).choices[0].message
    again = [*MESSAGES, message, {"role": "user", "content": "Go on."}]
    assert chat(server, messages=again, max_tokens=3).usage.completion_tokens == 3


def test_a_chat_goes_on_with_an_answer_that_has_begun(server: Live) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "The hat is"}]
    rest = chat(server, messages=begun, max_tokens=9, extra_body={"continue_final_message": True})
    said = [chat_template.Message(each["role"], each["content"]) for each in begun]
    prompt = chat_template.render(server.served.tokenizer, said)[0][:-1]
    assert rest.choices[0].message.content == alone(server, prompt, seed=1, max_tokens=9)
    assert rest.usage.prompt_tokens == len(prompt)
    as_vllm = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(server, messages=begun, max_tokens=9, extra_body=as_vllm).choices == rest.choices
    nothing = [*MESSAGES, {"role": "assistant", "content": ""}]
    whole = chat(server, messages=nothing, max_tokens=9, extra_body={"continue_final_message": True})
    assert whole.choices == chat(server, max_tokens=9).choices


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_every_event_is_json_as_short_as_it_can_be_with_the_same_fields(
    server: Live, path: str, logprobs: bool, usage: bool
) -> None:
    what = {"messages": MESSAGES} if path.startswith("chat") else {"prompt": '"\0"', "echo": True}
    body = {"model": "small", **what, "n": 3, "max_tokens": 9, "stream": True, "seed": 5}
    if usage:
        body["stream_options"] = {"include_usage": True}
    if logprobs:
        body["logprobs"] = True if path.startswith("chat") else 2
    *events, done, nothing = server.post(path, body).text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert len(events) == 3 * (1 + 9 + 1) + usage
    for event in events:
        content = json.loads(event.removeprefix("data: "))
        assert event == f"data: {json.dumps(content, separators=(',', ':'))}"
        fields = ["id", "created", "model", "object", "system_fingerprint", "choices", "usage"]
        assert list(content) == fields[: 6 + usage]
        for choice in content["choices"]:
            said = "delta" if path.startswith("chat") else "text"
            assert list(choice) == ["index", said, "logprobs", "finish_reason"]


def test_a_step_of_several_tokens_gives_the_same_answers(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> list[Any]:
        text = complete(server, n=3, max_tokens=13, logprobs=1).choices
        stop = text[1].text[4:6]
        cut = complete(server, n=3, max_tokens=13, stop=stop)
        streamed = [
            event.choices[0] for event in complete(server, n=3, max_tokens=13, stop=stop, stream=True) if event.choices
        ]
        by_text = [[each for each in streamed if each.index == index] for index in range(3)]
        assert ["".join(each.text for each in one) for one in by_text] == [each.text for each in cut.choices]
        assert stop not in cut.choices[1].text and cut.choices[1].finish_reason == "stop"
        return [text, cut.choices, cut.usage, by_text]

    wanted, batcher = answers(), server.worker.batcher
    one = batcher.step

    def several() -> list[Step]:
        return [step for _ in range(5) if not batcher.idle for step in one()]

    monkeypatch.setattr(batcher, "step", several)
    assert answers() == wanted


@pytest.mark.parametrize("ask", [complete, chat])
def test_a_stream_is_the_same_answer_bit_by_bit(server: Live, ask: Any) -> None:
    whole = ask(server, n=2, max_tokens=20)
    texts, ends, roles = ["", ""], [None, None], 0
    *chunks, last = ask(server, n=2, max_tokens=20, stream=True, stream_options={"include_usage": True})
    for chunk in chunks:
        assert chunk.usage is None and chunk.id == chunks[0].id
        (choice,) = chunk.choices
        roles += ask is chat and choice.delta.role == "assistant"
        texts[choice.index] += (choice.text if ask is complete else choice.delta.content) or ""
        ends[choice.index] = choice.finish_reason
    assert texts == [each.text if ask is complete else each.message.content for each in whole.choices]
    assert ends == ["length", "length"] and roles == (2 if ask is chat else 0)
    assert last.choices == [] and last.usage.model_dump() == whole.usage.model_dump()
    assert all(chunk.choices for chunk in ask(server, max_tokens=3, stream=True))


def test_every_token_has_an_event_and_done_comes_last(server: Live) -> None:
    body = {"model": "small", "prompt": PROMPT, "stream": True, "max_tokens": 40, "seed": 1}
    events = server.post("completions", body).text.split("\n\n")
    assert len(events) == 40 + 3 and events[-2:] == ["data: [DONE]", ""]


def test_two_clients_at_once_get_what_each_gets_alone(server: Live) -> None:
    prompts = ["Once upon", "Tim wanted", "the bear", "Caf\u00e9"]
    expected = [complete(server, prompt=each, seed=7, max_tokens=40).choices[0].text for each in prompts]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model="small", prompt=prompt, seed=7, max_tokens=40, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

    assert asyncio.run(together()) == expected


def test_several_choices_differ_and_repeat_with_their_seed(server: Live) -> None:
    first, second = (complete(server, n=3, seed=-5).choices for _ in range(2))
    assert first == second and [each.index for each in first] == [0, 1, 2]
    assert len({each.text for each in first}) == 3
    assert first[0].text == complete(server, seed=-5).choices[0].text
    assert complete(server, seed=None).choices[0].text != complete(server, seed=None).choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server: Live, stream: bool) -> None:
    text = complete(server, max_tokens=40).choices[0].text
    stop = text[10:13]
    for given in (stop, ["never said", stop]):
        answer = complete(server, max_tokens=40, stop=given, stream=stream, logprobs=0)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        starts = [start for choice in choices if choice.logprobs for start in choice.logprobs.text_offset]
        assert starts and max(starts) < text.index(stop)
    server.until(server.idle)


def test_the_piece_that_ends_a_message_is_no_part_of_it_and_that_of_a_completion_is_its_last_token(
    tokenizer: Tokenizer,
) -> None:
    (token,) = tokenizer.encode("fox")[:1]
    end = Step(0, tokenizer.eod, "stop")
    for closing, tokens in ((False, []), (True, [(len("echo") + len(tokenizer.decode([token])), end)])):
        choice = Choice(tokenizer, (), "echo", closing=closing)
        assert choice.push(Step(0, token, None)).produced
        assert choice.push(end) == ("", tokens, closing, "stop")
        assert choice.tokens == 1 + closing


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("written", [0, 2])
def test_every_token_of_prompt_and_completion_has_an_entry_the_ending_one_too(
    server: Live, ending: Callable[..., list[int]], written: int, stream: bool
) -> None:
    tokenizer = server.served.tokenizer
    prompt = document_prompt(tokenizer, PROMPT)
    for end in ("<|endoftext|>", "<|end|>"):
        ids = ending(written, end)
        for echo in (True, False):
            asked: dict[str, Any] = {"prompt": prompt, "echo": echo, "logprobs": 1, "max_tokens": written + 1, "n": 2}
            streamed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            chunks = list(complete(server, **asked, **streamed)) if stream else [complete(server, **asked)]
            assert chunks[-1].usage.completion_tokens == 2 * (written + 1)
            for index in range(2):
                choices = [each for chunk in chunks for each in chunk.choices if each.index == index]
                text = "".join(choice.text for choice in choices)
                assert text == (PROMPT if echo else "") + tokenizer.decode(ids)
                assert [choice.finish_reason for choice in choices][-1] == "stop"
                parts = [choice.logprobs for choice in choices if choice.logprobs]
                tokens, logprobs, tops, offsets = (
                    [each for part in parts for each in getattr(part, name)]
                    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
                )
                assert len(tokens) == len(logprobs) == len(tops) == len(offsets) == echo * len(prompt) + len(ids)
                assert (tokens[-1], offsets[-1]) == (end, len(text)) and tops[-1] == {end: logprobs[-1]}
        message = chat(server, logprobs=True, max_tokens=written + 1)
        assert len(message.choices[0].logprobs.content) == written == message.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_prompt_alone_is_scored_where_no_token_is_asked_for(server: Live, logprobs: int | None, stream: bool) -> None:
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    answer = complete(server, echo=True, logprobs=logprobs, max_tokens=0, stream=stream, **usage)
    chunks = list(answer) if stream else [answer]
    choices = [each for chunk in chunks for each in chunk.choices]
    assert "".join(choice.text for choice in choices) == PROMPT and choices[-1].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 0
    entries = [each for choice in choices if choice.logprobs for each in choice.logprobs.tokens]
    assert "".join(entries) == (PROMPT if logprobs == 0 else "")
    server.until(server.idle)


def test_tokens_wait_with_text_that_a_stop_string_may_take_back(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_bytes.index(bytes([byte])) for byte in b"ab"]
    taken, given = Choice(tokenizer, ["abc"], "echo"), Choice(tokenizer, ["abc"], "echo")
    for choice in (taken, given):
        assert [choice.push(Step(0, each, None)) for each in ids] == [("", [], True, None)] * 2
    assert taken.push(Step(0, tokenizer.token_bytes.index(b"c"), None)) == ("", [], True, "stop")
    text, tokens, produced, finish = given.push(None)
    assert (text, [start for start, _ in tokens], produced, finish) == ("ab", [4, 5], False, "length")


def test_temperature_nought_and_top_p_nought_take_the_likeliest(server: Live) -> None:
    expected = alone(server, document_prompt(server.served.tokenizer, PROMPT), temperature=0.0, max_tokens=16)
    assert complete(server, temperature=0).choices[0].text == expected
    assert complete(server, top_p=0).choices[0].text == expected
    assert complete(server, extra_body={"top_k": 1}).choices[0].text == expected


def test_our_own_ways_to_sample_are_obeyed(server: Live) -> None:
    options: dict[str, Any] = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    prompt = document_prompt(server.served.tokenizer, PROMPT)
    expected = alone(server, prompt, seed=1, max_tokens=16, top_p=0.9, temperature=1.5, **options)
    assert complete(server, top_p=0.9, temperature=1.5, extra_body=options).choices[0].text == expected


def test_penalties_and_biases_are_obeyed(server: Live) -> None:
    prompt = document_prompt(server.served.tokenizer, PROMPT)
    penalties = {"presence_penalty": 1.5, "frequency_penalty": -0.5}
    expected = alone(server, prompt, seed=1, max_tokens=16, logit_bias=((7, 12.5), (300, -100.0)), **penalties)
    assert complete(server, logit_bias={"7": 12.5, "300": -100}, **penalties).choices[0].text == expected
    for ask in (complete, chat):
        choice = ask(server, max_tokens=3, logit_bias={"65": 100}, temperature=0).choices[0]
        text = choice.text if ask is complete else choice.message.content
        assert text == server.served.tokenizer.decode([65] * 3) != ""


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_spell_the_answer_byte_by_byte(server: Live, stream: bool) -> None:
    answer = chat(server, temperature=0, logprobs=True, top_logprobs=3, max_tokens=20, stream=stream)
    chunks = list(answer) if stream else [answer]
    content = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert len(content) == 20
    spelled = b"".join(bytes(entry.bytes or ()) for entry in content)
    plain = chat(server, temperature=0, max_tokens=20).choices[0].message.content
    assert spelled.decode(errors="ignore") == plain.replace("\ufffd", "")
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
        assert 0 >= entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    without = chat(server, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in without] == [[], []]


def test_completion_logprobs_say_where_each_token_begins(server: Live) -> None:
    choice = complete(server, logprobs=2, max_tokens=30).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 30
    for token, logprob, start, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, logprobs.top_logprobs, strict=True
    ):
        # Bytes that turn out to be no character are shown as U+FFFD with the token after them.
        assert token.startswith("bytes:") or choice.text[start:].lstrip("\ufffd").startswith(token)
        assert top[token] == logprob and 2 <= len(top) <= 3


def test_echo_gives_the_prompt_back(server: Live) -> None:
    text = complete(server).choices[0].text
    assert complete(server, echo=True).choices[0].text == PROMPT + text
    assert "".join(chunk.choices[0].text for chunk in complete(server, echo=True, stream=True)) == PROMPT + text


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_gives_those_of_the_prompt(server: Live, stream: bool) -> None:
    tokenizer, model = server.served.tokenizer, server.worker.batcher.model
    ids = document_prompt(tokenizer, PROMPT)
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
    likeliest = expected.max(-1).values.tolist()
    for prompt, unread in ((ids, 0), (PROMPT, 1)):
        answer = complete(server, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0, stream=stream)
        found = [each.choices[0].logprobs for each in answer if each.choices[0].logprobs] if stream else []
        found = found or [answer.choices[0].logprobs]
        logprobs = [each for part in found for each in part.token_logprobs]
        top = [each for part in found for each in part.top_logprobs]
        if not unread:
            assert logprobs.pop(0) is None is top.pop(0)
        chosen = [expected[place, token].item() for place, token in enumerate(ids[1:])]
        assert logprobs == pytest.approx([*chosen, likeliest[-1]], abs=1e-3)
        assert [max(each.values()) for each in top] == pytest.approx(likeliest, abs=1e-3)
        offsets = [each for part in found for each in part.text_offset]
        assert offsets[-1] == len(PROMPT) and len(offsets) == len(ids) + 1 - unread


def test_prompts_may_be_token_ids_and_many(server: Live) -> None:
    ids = document_prompt(server.served.tokenizer, PROMPT)
    text = complete(server).choices[0].text
    assert complete(server, prompt=ids).choices[0].text == text
    for prompts in ([PROMPT, "the bear"], [ids, document_prompt(server.served.tokenizer, "the bear")]):
        answer = complete(server, prompt=prompts, n=2, echo=True)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text[: len(PROMPT)] for choice in answer.choices[:2]] == [PROMPT] * 2
        assert all(choice.text.startswith("the bear") for choice in answer.choices[2:])
        assert answer.choices[0].text == PROMPT + text and answer.usage.completion_tokens == 64
    assert complete(server, prompt=None).usage.prompt_tokens == 1


def test_a_limit_above_the_context_is_the_context(server: Live) -> None:
    assert chat(server, max_completion_tokens=5).usage.completion_tokens == 5
    assert complete(server, max_tokens=10**9).usage.total_tokens == CONTEXT


def test_fields_that_ask_for_nothing_are_taken(server: Live) -> None:
    plain = chat(server, max_tokens=5).choices
    neutral: dict[str, Any] = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "response_format": {"type": "text"},
        "logit_bias": {},
        "tools": [],
        "tool_choice": "auto",
        "stop": None,
        "moderation": None,
        "prompt_cache_options": {"mode": "implicit"},
        "messages": [
            {**MESSAGES[0], "name": "Tim"},
            {**MESSAGES[1], "annotations": [], "tool_calls": [], "refusal": None, "audio": None, "function_call": None},
        ],
    }
    assert chat(server, max_tokens=5, **neutral).choices == plain
    streamed = chat(server, max_tokens=5, stream=True, stream_options={"include_obfuscation": False})
    assert "".join(each.choices[0].delta.content or "" for each in streamed) == plain[0].message.content


def test_models_are_listed_and_found_by_name(server: Live) -> None:
    (model,) = server.openai.models.list()
    assert (model.id, model.object, model.created) == ("small", "model", 1_700_000_000)
    assert server.openai.models.retrieve("small") == model
    with pytest.raises(openai.NotFoundError) as error:
        server.openai.models.retrieve("gpt-4o")
    assert error.value.code == "model_not_found"

"""/v1/responses through OpenAI's own client: whole, as events, and what is refused by name."""

from collections.abc import Callable
from typing import Any

import openai
import pytest

from engine.tokenizer import Tokenizer
from tests.cli.server.conftest import Live, live

INPUT: list[Any] = [{"role": "system", "content": "Be brave."}, {"role": "user", "content": "Where is my hat?"}]
LOGPROBS: Any = ["message.output_text.logprobs"]


def respond(server: Live, **options: Any) -> Any:
    options = {"model": "small", "input": INPUT, "max_output_tokens": 12, "temperature": 0, **options}
    return server.openai.responses.create(**options)


def chat(server: Live, **options: Any) -> Any:
    options = {"model": "small", "messages": INPUT, "max_tokens": 12, "temperature": 0, **options}
    return server.openai.chat.completions.create(**options)


def test_a_response_is_what_the_chat_answers_and_its_fields_are_all_there(server: Live) -> None:
    answer, wanted = respond(server, metadata={"a": "b"}, store=True), chat(server)
    assert answer.id.startswith("resp_") and (answer.object, answer.status) == ("response", "incomplete")
    assert answer.incomplete_details.reason == "max_output_tokens" and answer.error is None
    assert answer.output_text == wanted.choices[0].message.content
    (message,) = answer.output
    assert message.id.startswith("msg_") and (message.role, message.status) == ("assistant", "incomplete")
    assert message.content[0].annotations == [] == message.content[0].logprobs
    used = answer.usage
    assert (used.input_tokens, used.output_tokens) == (wanted.usage.prompt_tokens, 12)
    assert used.total_tokens == wanted.usage.total_tokens and used.output_tokens_details.reasoning_tokens == 0
    # Nothing is stored, whatever was asked.
    assert answer.metadata == {"a": "b"} and answer.to_dict()["store"] is False


def test_input_is_a_text_or_messages_in_parts_and_instructions_are_the_system_message(server: Live) -> None:
    wanted = respond(server).output_text
    parts: Any = [{"type": "input_text", "text": "Where is "}, {"type": "input_text", "text": "my hat?"}]
    item = {"type": "message", "role": "user", "content": parts}
    for said in ("Where is my hat?", [item], [{"role": "user", "content": "Where is my hat?"}]):
        assert respond(server, input=said, instructions="Be brave.").output_text == wanted
    assert respond(server, input=[{"role": "developer", "content": "Be brave."}, item]).output_text == wanted


def test_an_answer_may_be_sent_back_as_it_came(server: Live) -> None:
    first = respond(server, max_output_tokens=3, include=LOGPROBS)
    again = respond(server, input=[*INPUT, *first.output, {"role": "user", "content": "Go on."}])
    said = [*INPUT, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "Go on."}]
    assert again.output_text == chat(server, messages=said).choices[0].message.content


@pytest.mark.parametrize("logprobs", [False, True])
def test_typed_events_tell_the_same_answer_bit_by_bit(server: Live, logprobs: bool) -> None:
    options = {"include": LOGPROBS, "top_logprobs": 2} if logprobs else {}
    whole, events = respond(server, **options), list(respond(server, stream=True, **options))
    assert [each.sequence_number for each in events] == list(range(len(events)))
    deltas = [each for each in events if each.type == "response.output_text.delta"]
    assert [each.type.removeprefix("response.") for each in events if each not in deltas] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert "".join(each.delta for each in deltas) == events[-4].text == whole.output_text
    last = events[-1].response
    assert last.usage == whole.usage and last.output[0].content == whole.output[0].content
    assert {each.item_id for each in deltas} == {last.output[0].id}
    entries = [entry for each in deltas for entry in each.logprobs]
    assert len(entries) == 12 * logprobs and [len(each.top_logprobs) for each in entries] == [2] * len(entries)
    assert [each.token for each in entries] == [each.token for each in last.output[0].content[0].logprobs]


def test_one_that_ends_by_itself_is_completed(server: Live, ending: Callable[..., list[int]]) -> None:
    text = server.served.tokenizer.decode(ending(2, "<|end|>")[:2])
    answer = respond(server)
    assert (answer.status, answer.output_text, answer.output[0].status) == ("completed", text, "completed")
    assert answer.completed_at and answer.incomplete_details is None and answer.usage.output_tokens == 2
    with server.openai.responses.stream(model="small", input=INPUT) as stream:
        assert stream.get_final_response().output_text == text


def test_a_model_that_fails_ends_the_events_with_response_failed(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(server.worker.batcher, "_arrived", fail)
    *_, last = respond(server, stream=True)
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    monkeypatch.undo()
    server.until(server.idle)


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
PICTURE = {"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "earlier": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "background": ({"background": True}, "background"),
    "stored prompt": ({"prompt": {"id": "p"}}, "prompt"),
    "tools": ({"tools": [{"type": "web_search"}]}, "tools"),
    "form": ({"text": {"format": {"type": "json_object"}}}, "text"),
    "reasoning": ({"reasoning": {"effort": "high"}}, "reasoning"),
    "call": ({"input": [*INPUT, CALL]}, "input[2].type"),
    "reference": ({"input": [*INPUT, {"type": "item_reference", "id": "msg_1"}]}, "input"),
    "picture": ({"input": [PICTURE]}, "input[0].content"),
    "nothing": ({"input": []}, "input"),
    "long": ({"input": "the bear " * 40}, "input"),
    "top without logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "n": ({"extra_body": {"n": 2}}, "n"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_is_stateful_or_a_tool_is_refused_by_name(server: Live, mistake: str) -> None:
    fields, param = REFUSED[mistake]
    with pytest.raises(openai.BadRequestError) as error:
        respond(server, **fields)
    assert error.value.param == param


def test_a_base_model_gives_no_responses(tokenizer: Tokenizer) -> None:
    with live(tokenizer, chat=False) as server, pytest.raises(openai.BadRequestError, match="base model"):
        respond(server)

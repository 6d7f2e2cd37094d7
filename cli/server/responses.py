"""/v1/responses, the plain part of it: a text or messages in, one message out, whole or as typed events.

Nothing is stored, and there are no tools: a client sends the whole conversation each time.
"""

import itertools
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from cli.server.answers import ChatAnswer, Token, to_json
from cli.server.openai import ANY, MESSAGES, NEUTRAL, Fields, Neutral, Options, TextPart, join_parts
from cli.server.worker import Job, ModelError

LOGPROBS = "message.output_text.logprobs"
# Beside the log-probabilities, all of it belongs to tools, pictures or reasoning, of which there are none.
Include = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsePart(TextPart):
    neutral: ClassVar[Neutral] = {**TextPart.neutral, "annotations": (ANY,), "logprobs": (ANY,)}
    shape: ClassVar = '{"type": "input_text", "text": "..."}, or "output_text" in what the assistant said'
    type: Literal["input_text", "output_text"]  # type: ignore[assignment]


class ResponseItem(Fields):
    neutral: ClassVar[Neutral] = {"id": (ANY,), "status": (ANY,), "phase": (ANY,)}
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str, BeforeValidator(partial(join_parts, ResponsePart), json_schema_input_type=str | list[ResponsePart])
    ]


def _as_items(value: Any) -> Any:
    if isinstance(value, list) and any(
        isinstance(each, dict) and each.get("type") == "item_reference" for each in value
    ):
        raise ValueError(
            "an item_reference is to what was stored, and this server stores nothing: send the item itself"
        )
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[list[ResponseItem], Field(min_length=1, max_length=MESSAGES)]


class ResponseRequest(Options):
    neutral: ClassVar[Neutral] = {
        **NEUTRAL,
        "store": (True, False),  # OpenAI's default is to store
        "background": (False,),
        "max_tool_calls": (ANY,),
        "truncation": ("disabled",),
        "text": ({}, {"format": {"type": "text"}}),
        "reasoning": ({}, {"effort": "none"}),
        "context_management": ([],),
        **dict.fromkeys(("previous_response_id", "conversation", "prompt"), ()),
    }
    input: Annotated[Items, BeforeValidator(_as_items, json_schema_input_type=str | Items)]
    instructions: str = Field("", description="A system message that comes first.")
    max_output_tokens: int | None = Field(None, ge=1, description="Else as many as the context has room for.")
    include: list[Include] = Field([], description=f"{LOGPROBS} asks for them; the others change nothing.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Those of so many likeliest, too.")
    metadata: dict[str, str] = Field({}, max_length=16, description="It comes back with the answer.")


class ResponseAnswer(ChatAnswer):
    """The answer to /v1/responses: one message."""

    prefix, said = "resp_", "input"
    asked: ResponseRequest

    async def whole(self, job: Job) -> dict[str, Any]:
        (text,), (tokens,) = await self.collect(job)
        return self._response(self._end, [self._message(self._end, [self._part(text, tokens)])])

    async def events(self, job: Job) -> AsyncIterator[str]:
        """Server-sent events with names and numbers, from response.created to the one that says how it ended."""
        numbers = itertools.count()

        def event(kind: str, **fields: Any) -> str:
            content = {"type": f"response.{kind}", **fields, "sequence_number": next(numbers)}
            return f"event: response.{kind}\ndata: {to_json(content)}\n\n"

        message = self._message("in_progress", [])
        item: dict[str, Any] = {"output_index": 0}
        part = {"item_id": message["id"], **item, "content_index": 0}
        yield (
            event("created", response=self._response("in_progress", []))
            + event("in_progress", response=self._response("in_progress", []))
            + event("output_item.added", **item, item=message)
            + event("content_part.added", **part, part=self._part("", []))
        )
        text, tokens = "", list[Token]()
        try:
            async for arrived in self._arrivals(job):
                events = []
                for _, chunk in arrived:
                    text += chunk.text
                    tokens += chunk.tokens
                    logprobs = self._logprobs(chunk.tokens)
                    if chunk.text or logprobs:
                        events.append(event("output_text.delta", **part, delta=chunk.text, logprobs=logprobs))
                yield "".join(events)
        except ModelError as error:
            failure = {"error": {"code": "server_error", "message": str(error)}}
            yield event("failed", response=self._response("failed", []) | failure)
            return
        content = self._part(text, tokens)
        message = self._message(self._end, [content])
        yield (
            event("output_text.done", **part, text=text, logprobs=content["logprobs"])
            + event("content_part.done", **part, part=content)
            + event("output_item.done", **item, item=message)
            + event(self._end, response=self._response(self._end, [message]))
        )

    @property
    def _end(self) -> str:
        return "completed" if self.choices[0].finish == "stop" else "incomplete"

    def _logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        return self.describe(tokens)["content"] if self.logprobs else []

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        entry = super()._entry(token, logprob)
        return entry | {"bytes": entry["bytes"] or []}  # clients expect a list

    def _part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(tokens)}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        name = "msg_" + self.head["id"].removeprefix(self.prefix)
        return {"id": name, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked, ended, used = self.asked, status in ("completed", "incomplete"), self.usage()
        return {
            "id": self.head["id"],
            "object": "response",
            "created_at": self.head["created"],
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": asked.model,
            "output": output,
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            }
            if ended
            else None,
            "instructions": asked.instructions or None,
            "max_output_tokens": asked.max_output_tokens,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_logprobs": asked.top_logprobs or 0,
            "metadata": asked.metadata,
            # What is not to be had here says so.
            "background": False,
            "max_tool_calls": None,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

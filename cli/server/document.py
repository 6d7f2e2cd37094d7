"""What the API says of itself: the OpenAPI document, and a page for people that is made from it.

The page is plain HTML. The usual viewers are a megabyte of scripts, which the policy of this server would not run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

from cli import DISTRIBUTION, installed
from cli.server.openai import ChatRequest, CompletionRequest, Options
from cli.server.responses import ResponseRequest

REF = "#/components/schemas/"
# The bounds in a schema, in words.
BOUNDS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "above",
    "exclusiveMaximum": "below",
    "minLength": "at least",
    "maxLength": "at most",
    "minItems": "at least",
    "maxItems": "at most",
    "maxProperties": "at most",
}
# Each of a stream's.
EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "description": "JSON, or [DONE] at the end"},
    },
    "required": ["data"],
}
Finish = Literal["stop", "length"]


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Problem(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(Reply):
    error: Problem


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Whole(Reply):
    """An answer that is not streamed."""

    id: str
    created: int
    model: str
    system_fingerprint: None
    usage: Usage


class Completion(Whole):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Likely(Reply):
    token: str
    logprob: float
    bytes: list[int] | None


class Logprob(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(Reply):
    content: list[Logprob]
    refusal: None


class Answer(Reply):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Whole):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class OutputText(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Logprob]


class OutputMessage(Reply):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """It has OpenAI's other fields, too, which say that there is no store, no tool and no reasoning."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[Literal["reason"], Literal["max_output_tokens"]] | None
    model: str
    output: Annotated[list[OutputMessage], Field(min_length=1, max_length=1)]
    usage: ResponseUsage
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    metadata: dict[str, str]
    store: Literal[False]


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Reply):
    object: Literal["list"]
    data: list[Model]


class Health(Reply):
    status: str


class About(Reply):
    model: str
    chat: bool
    context: int
    key_required: bool


@dataclass(frozen=True)
class Operation:
    """What a path takes and gives; None is plain text. `refuses`: the statuses of refusals, beside 401. `failed`: what
    stands in place of 200 where the model has failed.
    """

    about: str
    gives: type[BaseModel] | None
    asks: type[Options] | None = None
    refuses: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()

    def responses(self, *, locked: bool) -> dict[int | str, dict[str, Any]]:
        """Return what FastAPI has to know of its answers; `locked`: it asks for a key."""
        text = (
            {"text/event-stream": {"schema": EVENT}} if self.gives else {"text/plain": {"schema": {"type": "string"}}}
        )
        given: dict[str, Any] = {"description": "The answer", "content": text if self.asks or not self.gives else {}}
        given |= {"model": self.gives} if self.gives else {}
        refusals = (*self.refuses, *([401] if locked else []))
        told: dict[int | str, Any] = {status: {**given, "description": "It has failed"} for status in self.failed}
        return {200: given, **told, **{status: {"model": Refusal, "description": "A refusal"} for status in refusals}}


POST = (400, 404, 408, 413, 429, 500, 503)
OPERATIONS: Mapping[str, Operation] = {
    "/v1/chat/completions": Operation("Answer messages; a chat model only.", ChatCompletion, ChatRequest, POST),
    "/v1/completions": Operation("Go on from texts or token ids; any model.", Completion, CompletionRequest, POST),
    "/v1/responses": Operation("Answer a text or messages; a chat model only.", ResponseObject, ResponseRequest, POST),
    "/v1/models": Operation("Name the model that is served.", Models),
    "/v1/models/{name:path}": Operation("Tell about a model.", Model, refuses=(404,)),
    "/metrics": Operation("Tell what was counted, in Prometheus' text format.", None),
    "/health": Operation("Tell whether the model works; 503 once it has failed.", Health, failed=(503,)),
    "/page.json": Operation("Tell what the page has to know.", About),
}


def describe(app: FastAPI, model: str) -> dict[str, Any]:
    """Return the OpenAPI document of an application that serves `model`. Bodies are read by hand, and added here."""
    document = get_openapi(
        title="gpt serve", version=installed(DISTRIBUTION) or "0", summary=f"The API of {model}", routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for path, operation in OPERATIONS.items():
        if operation.asks:
            schema = operation.asks.model_json_schema(ref_template=REF + "{model}")
            schema["properties"]["model"] = {"enum": [model]}
            schemas |= {**schema.pop("$defs", {}), operation.asks.__name__: schema}
            content = {"application/json": {"schema": {"$ref": REF + operation.asks.__name__}}}
            document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    return document


def page(document: Mapping[str, Any]) -> str:
    """Return the document as a page of HTML, without any script."""
    title, schemas = escape(document["info"]["summary"]), document["components"]["schemas"]
    sections = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines = [
                f"<h2><code><b>{method.upper()}</b> {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>"
            ]
            answer = operation["responses"]["200"]["content"]
            given = [
                f"{kind} ({_spell(content['schema'])})" if "$ref" in content["schema"] else kind
                for kind, content in answer.items()
            ]
            refused = ", ".join(status for status in operation["responses"] if status != "200")
            lines.append(f"<p>Gives {' or '.join(given)}.{f' Refuses with {refused}.' if refused else ''}</p>")
            if asked := operation.get("requestBody"):
                name = asked["content"]["application/json"]["schema"]["$ref"].removeprefix(REF)
                lines.append(_table(name, schemas[name]))
            sections.append(f"<section>{''.join(lines)}</section>")
    asked_for = {each.asks.__name__ for each in OPERATIONS.values() if each.asks}
    tables = "".join(_table(name, schema) for name, schema in sorted(schemas.items()) if name not in asked_for)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="docs.css"></head>
<body><h1>{title}</h1><p>It speaks as OpenAI's does. null leaves a field out, and a field that is not
named here is refused. For programs there is <a href="openapi.json">openapi.json</a>.</p>{"".join(sections)}
<section><h2>Types</h2>{tables}</section></body></html>"""


def _table(name: str, schema: Mapping[str, Any]) -> str:
    """Return the fields of an object."""
    rows, needed = [], schema.get("required", ())
    for field, about in schema["properties"].items():
        text = escape(about.get("description", ""))
        if field in needed and len(needed) < len(schema["properties"]):
            text = f"{text} <em>Needed.</em>"
        elif about.get("default") is not None:
            text = f"{text} <em>Else {_code(about['default'])}.</em>"
        rows.append(f"<tr><th>{escape(field)}</th><td>{_spell(about)}</td><td>{text}</td></tr>")
    about = escape(schema.get("description", ""))
    return f'<h3 id="{name}">{name}</h3><p>{about}</p><div><table>{"".join(rows)}</table></div>'


def _code(value: Any) -> str:
    return f"<code>{escape(json.dumps(value))}</code>"


def _spell(schema: Mapping[str, Any]) -> str:
    """Return a type in words, as HTML."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(REF)
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_spell(each) for each in schema["anyOf"] if each != {"type": "null"})
    if "enum" in schema or "const" in schema:
        return (
            " or ".join(_code(each) for each in schema.get("enum", [schema.get("const")]) if each is not None) or "null"
        )
    kind = str(schema.get("type", "anything"))
    bounds = [f"{word} {schema[key]:,}" for key, word in BOUNDS.items() if key in schema and abs(schema[key]) < 2**53]
    kind += " of characters" if "maxLength" in schema else ""
    inner = schema.get("items", schema.get("additionalProperties"))
    of = f" of {_spell(inner)}" if isinstance(inner, dict) else ""
    return kind + (f" ({', '.join(bounds)})" if bounds else "") + of

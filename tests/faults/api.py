"""Requests made from the API's own schema, right ones and wrong ones: none is answered by a failure of the server."""

import json
import random
import string
from collections.abc import Iterator, Mapping
from typing import Any

from cli.server.openai import UNSUPPORTED, ChatRequest, CompletionRequest, Options
from cli.server.responses import ResponseRequest
from tests.faults import child
from tests.faults.board import Board
from tests.faults.damage import ODD_VALUES

REQUESTS = 4000
AT_A_TIME = 250
PATHS: dict[str, type[Options]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
}
OTHER_PATHS = (
    *("/", "/health", "/metrics", "/v1/models", "/v1/models/x", "/page.json", "/docs", "/openapi.json"),
    *("/nothing", "/%2e%2e/%00", "//x"),
)
TYPES = ("application/json", "application/json; charset=utf-8", "text/plain", "", "multipart/form-data")


def text(draw: random.Random, most: int = 20) -> str:
    letters = string.printable + "\u00e9\u2603\U0001f98a\u0000\u2581"
    return "".join(draw.choice(letters) for _ in range(draw.randrange(most + 1)))


def value(schema: Mapping[str, Any], draw: random.Random, defs: Mapping[str, Any]) -> Any:
    """Return a value that the schema allows, often at a bound of it."""
    if "$ref" in schema:
        return value(defs[schema["$ref"].rpartition("/")[2]], draw, defs)
    if "anyOf" in schema:
        return value(draw.choice(schema["anyOf"]), draw, defs)
    if "enum" in schema or "const" in schema:
        return draw.choice(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        least = schema.get("minimum", schema.get("exclusiveMinimum", -5))
        most = schema.get("maximum", schema.get("exclusiveMaximum", max(least, 0) + 5))
        found = draw.choice((least, most, least + (most - least) * draw.random()))
        return int(found) if kind == "integer" else found
    if kind == "string":
        return text(draw, min(schema.get("maxLength", 20), 20)) or "x" * schema.get("minLength", 0)
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "array":
        least = schema.get("minItems", 0)
        return [
            value(schema["items"], draw, defs) for _ in range(draw.randint(least, min(schema.get("maxItems", 3), 3)))
        ]
    if kind == "object":
        needed = schema.get("required", ())
        fields = schema.get("properties", {})
        return {name: value(each, draw, defs) for name, each in fields.items() if name in needed or draw.random() < 0.2}
    return None if kind == "null" else anything(draw)


def anything(draw: random.Random, depth: int = 3) -> Any:
    if depth == 0 or draw.random() < 0.6:
        return draw.choice([*ODD_VALUES, text(draw), draw.randrange(-(2**70), 2**70), draw.uniform(-1e9, 1e9)])
    inner = [anything(draw, depth - 1) for _ in range(draw.randrange(4))]
    return inner if draw.random() < 0.5 else {text(draw, 6): each for each in inner}


def body(kind: Any, draw: random.Random) -> bytes:
    """Return a request: as the schema says, with one thing wrong, or anything at all."""
    schema = kind.model_json_schema()
    asked: Any = value(schema, draw, schema.get("$defs", {}))
    asked |= {"model": "small"} if draw.random() < 0.95 else {}
    asked |= {"max_tokens": draw.randint(1, 4)} if draw.random() < 0.8 else {}
    how = draw.randrange(8)
    if how == 0:
        asked[draw.choice([*asked, *schema["properties"]])] = anything(draw)
    elif how == 1:
        asked[draw.choice([*sorted(UNSUPPORTED), text(draw)])] = anything(draw)
    elif how == 2:
        asked.pop(draw.choice([*asked]))
    elif how == 3:
        asked = anything(draw)
    content = json.dumps(asked).encode()
    if how == 4 and draw.random() < 0.5:
        at = draw.randrange(len(content))
        content = content[:at] + draw.randbytes(draw.randrange(3)) + content[at + draw.randrange(3) :]
    return content


def requests(draw: random.Random, count: int) -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    for _ in range(count):
        path = draw.choice([*PATHS])
        sent, method, headers = body(PATHS[path], draw), "POST", {"Content-Type": "application/json"}
        if draw.random() < 0.05:
            path, method = draw.choice(OTHER_PATHS), draw.choice(("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "POST"))
        if draw.random() < 0.05:
            headers["Content-Type"] = draw.choice(TYPES)
        if draw.random() < 0.05:
            name = draw.choice(("Authorization", "Origin", "Accept", "X-Odd"))
            headers[name] = "".join(each for each in text(draw) if " " < each < "\x7f")
        yield method, path, sent, headers


def ask(seed: str, count: int) -> None:
    """Start a server in this process, and ask it. What is wrong is printed as FAIL, its kind, and the request."""
    import httpx

    from engine.tokenizer import Tokenizer
    from tests.cli.server.conftest import live

    seen: dict[int, int] = {}
    with live(Tokenizer.load("tokenizer.model")) as server:
        for method, path, sent, headers in requests(random.Random(seed), count):
            try:
                answer = server.http.request(method, path, content=sent, headers=headers)
            except httpx.TimeoutException:
                print(f"FAIL hang: {method} {path} {sent!r}")
                continue
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code >= 500:
                print(f"FAIL 5xx: {answer.status_code} for {method} {path} {sent!r}: {answer.text[:200]!r}")
            elif answer.status_code >= 400 and method == "POST" and "error" not in answer.text:
                print(f"FAIL unnamed: {answer.status_code} for {method} {path} {sent!r}: {answer.text[:200]!r}")
        if server.http.get("/health").status_code != 200:
            print("FAIL 5xx: at the end it says that it is not well")
    print(f"statuses: {dict(sorted(seen.items()))}")


def run(board: Board) -> None:
    for case in board.cases(REQUESTS // AT_A_TIME):
        case.what = f"{AT_A_TIME} requests"
        board.tried += AT_A_TIME - 1

        def work(number: int = case.number) -> None:
            ask(f"{board.seed} {number}", AT_A_TIME)

        done = child.run(work, board.world, 300)
        case.judge(done)
        case.told(done)

"""The OpenAPI document says what the server does: schemathesis asks from it, and compares."""

import re
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from engine.tokenizer import Tokenizer
from tests.cli.server.conftest import Live, live

POSTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
GETS = ("/v1/models", "/v1/models/{name}", "/metrics", "/health", "/page.json")


def document(server: Live) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [("POST", path, mode) for path in POSTS for mode in GenerationMode]
    + [("GET", path, GenerationMode.POSITIVE) for path in GETS],
)
def test_what_is_asked_from_the_document_is_answered_as_it_says(
    server: Live, method: str, path: str, mode: GenerationMode
) -> None:
    with requests.Session() as session:

        @settings(max_examples=15, phases=[Phase.generate])
        @given(case=document(server)[path][method].as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            # What is too long, or what two fields say together, no schema can tell.
            answer = case.call_and_validate(session=session, excluded_checks=[positive_data_acceptance])
            if mode is GenerationMode.POSITIVE and answer.status_code == 400:
                assert answer.json()["error"]["code"] not in ("unknown_parameter", "unsupported_parameter"), answer.text

        ask()


@pytest.mark.parametrize("path", POSTS)
def test_events_are_as_the_document_says(server: Live, path: str) -> None:
    said: Any = {"input": "a"} if path == POSTS[2] else {"prompt": "a"}
    said = {"messages": [{"role": "user", "content": "a"}]} if path == POSTS[0] else said
    case = document(server)[path]["POST"].Case(body={"model": "small", "stream": True, "seed": 1, **said})
    assert "text/event-stream" in case.call_and_validate().headers["content-type"][0]


def test_a_whole_number_may_be_spelled_with_a_fraction(server: Live) -> None:
    body = b'{"model": "small", "prompt": [5.0], "max_tokens": 3.0, "temperature": 0, "best_of": 1.0}'
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_the_page_for_people_names_all_fields_and_needs_no_script(server: Live) -> None:
    told, page = server.http.get("/openapi.json").json(), server.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html") and "<script" not in page.text
    for name, schema in told["components"]["schemas"].items():
        assert f'id="{name}"' in page.text
        assert all(f"<th>{field}</th>" in page.text for field in schema["properties"])
    assert set(re.findall('href="#([^"]+)"', page.text)) <= set(told["components"]["schemas"])
    for path in re.findall('href="([a-z.]+)"', page.text):
        assert server.http.get(f"/{path}").status_code == 200, path


def test_the_document_asks_for_a_key_where_the_server_does(tokenizer: Tokenizer) -> None:
    with live(tokenizer, key="secret") as server:
        paths = server.http.get("/openapi.json").json()["paths"]
        assert all(
            ("401" in operation["responses"])
            == bool(operation.get("security"))
            == (path not in ("/health", "/page.json"))
            for path, operations in paths.items()
            for operation in operations.values()
        )

"""What is not obeyed is refused by name, in OpenAI's shape, before anything is answered."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cli.server import app
from cli.server import openai as api
from engine.chat_template import Message, answer_prompt
from engine.tokenizer import Tokenizer
from tests.cli.server.conftest import CONTEXT, Live, live

HELLO = [{"role": "user", "content": "Hello"}]
CHAT_ERRORS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "tools": ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    "functions": ({"functions": [{}]}, "functions", "unsupported_parameter"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    "audio": ({"audio": {"voice": "alloy"}}, "audio", "unsupported_parameter"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
    "store": ({"store": True}, "store", "unsupported_parameter"),
    "no messages": ({"messages": []}, "messages", "invalid_value"),
    "missing messages": ({"messages": None}, "messages", "missing_required_parameter"),
    "many messages": ({"messages": HELLO * (api.MESSAGES + 1)}, "messages", "invalid_value"),
    "tool message": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
    "misspelt": ({"messages": [{**HELLO[0], "nmae": "Tim"}]}, "messages[0].nmae", "unknown_parameter"),
    "call": ({"messages": [{**HELLO[0], "tool_calls": [{}]}]}, "messages[0].tool_calls", "unsupported_parameter"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content",
        "invalid_value",
    ),
    "nothing to go on with": ({"continue_final_message": True}, "messages", "invalid_value"),
    "on and anew": ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt", None),
    "neither": ({"add_generation_prompt": False}, "add_generation_prompt", None),
    "two limits": ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", None),
    "top without logprobs": ({"top_logprobs": 1}, "top_logprobs", None),
    "many logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    "long": ({"messages": [{"role": "user", "content": "the bear " * 40}]}, "messages", "context_length_exceeded"),
    "endless": ({"messages": [{"role": "user", "content": "x" * 500_000}]}, "messages", "context_length_exceeded"),
    "long stream": (
        {"messages": [{"role": "user", "content": "the bear " * 40}], "stream": True},
        "messages",
        "context_length_exceeded",
    ),
}
COMPLETION_ERRORS: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "unknown": ({"promt": "x"}, "promt", "unknown_parameter"),
    "penalty": ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
    "bias": ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
    "biased nothing": ({"logit_bias": {"1000000": 1}}, "logit_bias", "invalid_value"),
    "biased at length": ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "invalid_value"),
    "biased word": ({"logit_bias": {"fox": 1}}, "logit_bias.fox", "invalid_value"),
    "best of": ({"best_of": 3}, "best_of", "unsupported_parameter"),
    "suffix": ({"suffix": "the end"}, "suffix", "unsupported_parameter"),
    "usage without stream": ({"stream_options": {"include_usage": True}}, "stream_options", None),
    "hot": ({"temperature": 2.1}, "temperature", "invalid_value"),
    "text for a number": ({"temperature": "1"}, "temperature", "invalid_value"),
    "true for a number": ({"n": True}, "n", "invalid_value"),
    "many choices": ({"n": 1000}, "n", "invalid_value"),
    "more choices than places": ({"n": 13}, None, None),
    "no tokens": ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    "huge seed": ({"seed": 2**63}, "seed", "invalid_value"),
    "five stops": ({"stop": list("abcde")}, "stop", "invalid_value"),
    "empty stop": ({"stop": ""}, "stop[0]", "invalid_value"),
    "endless stop": ({"stop": ["x" * 1000]}, "stop[0]", "invalid_value"),
    "our own": ({"min_p": 1}, "min_p", "invalid_value"),
    "no prompts": ({"prompt": []}, "prompt", "invalid_value"),
    "mixed prompts": ({"prompt": ["a", 1]}, "prompt", "invalid_value"),
    "empty ids": ({"prompt": [[]]}, "prompt", "invalid_value"),
    "not an id": ({"prompt": [1, 10**6]}, "prompt", "invalid_value"),
    "negative id": ({"prompt": [[5], [-1]]}, "prompt", "invalid_value"),
    "long": ({"prompt": [5] * CONTEXT}, "prompt", "context_length_exceeded"),
    "no model": ({"model": None}, "model", "missing_required_parameter"),
}


def refused(answer: httpx.Response, status: int, param: str | None, code: str | None) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"} and error["message"]


@pytest.mark.parametrize("mistake", CHAT_ERRORS)
def test_a_chat_that_cannot_be_obeyed_is_refused_by_name(server: Live, mistake: str) -> None:
    fields, param, code = CHAT_ERRORS[mistake]
    refused(server.post("chat/completions", {"model": "small", "messages": HELLO, **fields}), 400, param, code)


@pytest.mark.parametrize("mistake", COMPLETION_ERRORS)
def test_a_completion_that_cannot_be_obeyed_is_refused_by_name(server: Live, mistake: str) -> None:
    fields, param, code = COMPLETION_ERRORS[mistake]
    refused(server.post("completions", {"model": "small", "prompt": "x", **fields}), 400, param, code)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff", b'{"model": NaN}', b"[" * 100_000, b"[]", b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(server: Live, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 400, None, None)


def test_half_a_character_is_refused(server: Live) -> None:
    for field, param in (("prompt", "prompt"), ("\\ud800", None)):
        body = f'{{"model": "small", "{field}": "\\ud800"}}'.encode()
        answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        refused(answer, 400, param, "invalid_value")


def test_what_another_sites_page_may_send_unasked_is_refused(server: Live) -> None:
    body = b'{"model": "small", "prompt": "x"}'
    refused(server.http.post("/v1/completions", content=body, headers={"Content-Type": "text/plain"}), 400, None, None)


def test_another_model_is_not_found(server: Live) -> None:
    refused(server.post("completions", {"model": "gpt-4o"}), 404, "model", "model_not_found")
    refused(server.http.get("/v1/nothing"), 404, None, None)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/images/generations", "/v1/responses/resp_1/cancel", "/"])
def test_what_is_not_there_is_not_found_and_what_there_is_is_named(server: Live, path: str) -> None:
    answer = server.http.post(path, json={"model": "small"})
    refused(answer, 404, None, None)
    told = answer.json()["error"]["message"]
    assert path in told and "POST /v1/responses" in told and "GET /docs" in told


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/completions", "POST"), ("GET", "/v1/responses", "POST"), ("DELETE", "/v1/models/small", "GET")],
)
def test_a_method_that_a_path_does_not_take_is_refused_with_the_one_that_it_does(
    server: Live, method: str, path: str, allowed: str
) -> None:
    answer = server.http.request(method, path)
    refused(answer, 405, None, "method_not_supported")
    assert answer.headers["allow"] == allowed and allowed in answer.json()["error"]["message"]


def test_nothing_is_stored_to_be_asked_for_later(server: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="stores nothing"):
        server.openai.responses.retrieve("resp_1")


def test_a_large_body_is_refused_before_all_of_it_is_read(server: Live) -> None:
    body = b" " * (app.BODY_BYTES + 1)
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 413, None, None)


def test_a_base_model_is_no_partner_for_a_chat(tokenizer: Tokenizer) -> None:
    with live(tokenizer, chat=False) as server:
        answer = server.post("chat/completions", {"model": "small", "messages": HELLO})
        refused(answer, 400, "model", "unsupported_model")
        assert "/v1/completions" in answer.json()["error"]["message"]
        assert server.http.get("/page.json").json() == {
            "model": "small",
            "chat": False,
            "context": CONTEXT,
            "key_required": False,
        }


def test_without_the_key_nothing_but_the_page_and_health_answers(tokenizer: Tokenizer) -> None:
    with live(tokenizer, key="secret") as server:
        for path in ("/v1/models", "/v1/models/small", "/metrics"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                refused(server.http.get(path, headers=headers), 401, None, "invalid_api_key")
        refused(server.post("completions", {"nonsense": 1}), 401, None, "invalid_api_key")
        assert server.http.get("/v1/models", headers={b"Authorization": b"Bearer \xff"}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            server.openai.with_options(api_key="wrong").models.list()
        assert server.openai.models.list().data
        assert server.http.get("/health").status_code == 200
        assert server.http.get("/page.json").json()["key_required"] is True


def test_every_answer_carries_strict_headers(server: Live) -> None:
    for path in ("/health", "/v1/models", "/nothing", "/page.json", "/docs", "/openapi.json"):
        headers = server.http.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store" and "access-control-allow-origin" not in headers
    assert server.http.get("/redoc").status_code == 404


def test_the_page_is_served_where_there_is_one(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text("<title>gpt</title>")
    monkeypatch.setattr(app, "PAGE", tmp_path)
    with live(tokenizer, key="secret") as server:
        page = server.http.get("/")
        assert page.text == "<title>gpt</title>" and page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        for path in ("/app.js", "/..%2f..%2fetc/passwd"):
            refused(server.http.get(path), 404, None, None)


@pytest.mark.parametrize(("host", "status"), [("localhost:1", 200), ("[::1]:8000", 200), ("evil.com", 400), ("[", 400)])
def test_a_name_that_was_bound_to_this_machine_by_others_is_refused(server: Live, host: str, status: int) -> None:
    assert server.http.get("/health", headers={"Host": host}).status_code == status


def test_only_sites_that_were_named_may_call_from_their_pages(tokenizer: Tokenizer) -> None:
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with live(tokenizer, cors=("https://good.example",), key="secret") as server:
        for origin, allowed in (("https://good.example", "https://good.example"), ("https://evil.example", None)):
            asked = server.http.options("/v1/completions", headers={"Origin": origin, **asking})
            assert asked.headers.get("access-control-allow-origin") == allowed
            assert (
                server.http.get("/health", headers={"Origin": origin}).headers.get("access-control-allow-origin")
                == allowed
            )


DEPTHS = [10, 100, 900, 960, 980, 1000, 100_000]
ODD = [*("[" * depth + "]" * depth for depth in DEPTHS), *('{"a":' * depth + "1" + "}" * depth for depth in DEPTHS)]
ODD += ["1" * 4000, "-" + "1" * 4000, "1" * 5000, "1e999", "-1e999", '"\\ud800"']


@pytest.mark.parametrize("field", ["messages", "stop", "seed", "temperature", "max_tokens", "logit_bias", "\\ud800"])
def test_json_that_is_deep_or_has_long_numbers_is_answered_with_a_sentence(server: Live, field: str) -> None:
    for odd in ODD:
        body = (
            f'{{"model": "small", "messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, "{field}": {odd}}}'
        )
        headers = {"Content-Type": "application/json"}
        answer = server.http.post("/v1/chat/completions", content=body, headers=headers)
        if not (field == "max_tokens" and odd == "1" * 4000) and not (field == "stop" and odd.startswith('"')):
            assert answer.status_code == 400 and answer.json()["error"]["message"], odd[:50]


def test_what_an_imported_models_own_template_refuses_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.engine import foreign

    tokenizer = foreign.imported(tmp_path, "mistral")
    with live(tokenizer) as server:
        asked = {"model": "small", "max_tokens": 4, "temperature": 0}
        answer = server.post("chat/completions", asked | {"messages": HELLO}).json()
        assert answer["usage"]["prompt_tokens"] == len(answer_prompt(tokenizer, [Message("user", "Hello")]))
        refused = server.post("chat/completions", asked | {"messages": [{"role": "system", "content": "a"}, *HELLO]})
        error = refused.json()["error"]
        assert (
            refused.status_code == 400 and error["param"] == "messages" and "roles must alternate" in error["message"]
        )

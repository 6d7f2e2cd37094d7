"""langchain-openai: ChatOpenAI on both of its APIs, and OpenAI for completions."""

# client langchain-openai: langchain-openai==1.7.4

import importlib
import os
from typing import Any

from bench.compatibility import tried

langchain: Any = importlib.import_module("langchain_openai")

CHAT = {"model": "chat", "base_url": os.environ["CHAT_URL"] + "/v1", "api_key": "none", "temperature": 0}
MESSAGES: list[Any] = [("system", "Be brief."), ("user", "Write a story.")]

WAYS: dict[str, dict[str, Any]] = {
    "ChatOpenAI": {},
    "ChatOpenAI with logprobs and penalties": {"logprobs": True, "top_logprobs": 2, "presence_penalty": 0.5, "seed": 1},
    "ChatOpenAI with use_responses_api": {"use_responses_api": True},
}
for name, settings in WAYS.items():
    model = langchain.ChatOpenAI(**CHAT, max_tokens=24, **settings)
    with tried(f"{name}: invoke, and a second turn") as say:
        answer = model.invoke(MESSAGES)
        assert answer.text and answer.usage_metadata["output_tokens"] == 24
        assert model.invoke([*MESSAGES, answer, ("user", "Go on.")]).text
        say(f"{answer.usage_metadata['total_tokens']} tokens")
    with tried(f"{name}: stream") as say:
        chunks = list(model.stream(MESSAGES))
        assert "".join(each.text for each in chunks) == answer.text
        say(f"{len(chunks)} chunks")
with tried("OpenAI: invoke and stream"):
    text = langchain.OpenAI(**{**CHAT, "model": "base", "base_url": os.environ["BASE_URL"] + "/v1"}, max_tokens=24)
    assert text.invoke("Once upon a time") == "".join(text.stream("Once upon a time")) != ""

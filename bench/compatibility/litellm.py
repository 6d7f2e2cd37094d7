"""litellm: its `completion`, `text_completion` and `responses`, whole and streamed, on our API."""

# client litellm: litellm==1.110.2

import importlib
import os
from typing import Any

from bench.compatibility import tried

litellm: Any = importlib.import_module("litellm")

CHAT = {"model": "openai/chat", "api_base": os.environ["CHAT_URL"] + "/v1", "api_key": "none"}
BASE = {"model": "text-completion-openai/base", "api_base": os.environ["BASE_URL"] + "/v1", "api_key": "none"}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write a story."}]
ASK = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}

whole = litellm.completion(**CHAT, **ASK)
with tried("completion") as say:
    assert whole.choices[0].message.content and whole.usage.completion_tokens == 12
    say(f"{whole.usage.total_tokens} tokens")
with tried("completion, streamed") as say:
    chunks = list(litellm.completion(**CHAT, **ASK, stream=True, stream_options={"include_usage": True}))
    said = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert said == whole.choices[0].message.content and chunks[-1].usage.completion_tokens == 12
    say(f"{len(chunks)} chunks")
with tried("an answer of litellm's is sent back as it is"):
    again = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": "Go on."}]
    assert litellm.completion(**CHAT, messages=again, max_tokens=4).usage.completion_tokens == 4
with tried("seed, stop, n, penalties, logit_bias, logprobs"):
    options: dict[str, Any] = {"seed": 1, "stop": ["\n"], "n": 2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    answer = litellm.completion(
        **CHAT, **{**ASK, "temperature": 1}, **options, logit_bias={"5": -100}, logprobs=True, top_logprobs=2
    )
    assert len(answer.choices) == 2 and len(answer.choices[0].logprobs["content"][0]["top_logprobs"]) == 2
with tried("text_completion"):
    text = litellm.text_completion(**BASE, prompt="Once upon a time", max_tokens=12, temperature=0)
    assert text.choices[0].text and text.usage.completion_tokens == 12
with tried("responses, whole and streamed") as say:
    asked = {"input": "Write a story.", "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0}
    response = litellm.responses(**CHAT, **asked)
    events = list(litellm.responses(**CHAT, **asked, stream=True))
    text = response.output[0].content[0].text
    assert text and text == "".join(each.delta for each in events if each.type == "response.output_text.delta")
    say(f"{len(events)} events")
with tried("what is too long raises ContextWindowExceededError"):
    try:
        litellm.completion(**CHAT, messages=[{"role": "user", "content": "the bear " * 400}])
        raise RuntimeError("it did not")
    except litellm.ContextWindowExceededError:
        pass

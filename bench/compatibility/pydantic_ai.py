"""pydantic-ai: an Agent on the chat API and on the responses API."""

# client pydantic-ai: pydantic-ai-slim==2.68.0 openai==3.57.0

import asyncio
import importlib
import os
from typing import Any

from bench.compatibility import tried

pydantic_ai: Any = importlib.import_module("pydantic_ai")
models: Any = importlib.import_module("pydantic_ai.models.openai")
OpenAIProvider: Any = importlib.import_module("pydantic_ai.providers.openai").OpenAIProvider

PROVIDER = OpenAIProvider(base_url=os.environ["CHAT_URL"] + "/v1", api_key="none")
SETTINGS = {"max_tokens": 40, "temperature": 0.0, "seed": 1, "presence_penalty": 0.5}


async def streamed(agent: Any) -> str:
    async with agent.run_stream("Write a story.") as result:
        return str(await result.get_output())


for kind in ("OpenAIChatModel", "OpenAIResponsesModel"):
    settings = {
        name: value for name, value in SETTINGS.items() if "Chat" in kind or name in ("max_tokens", "temperature")
    }
    agent = pydantic_ai.Agent(
        getattr(models, kind)("chat", provider=PROVIDER), system_prompt="Be brief.", model_settings=settings
    )
    with tried(f"{kind}: run_sync, and a second turn with its history") as say:
        first = agent.run_sync("Write a story.")
        second = agent.run_sync("Go on.", message_history=first.all_messages())
        assert first.output and second.output
        say(f"{first.usage.output_tokens} tokens")
    with tried(f"{kind}: run_stream"):
        assert asyncio.run(streamed(agent)) == first.output
    with tried(f"{kind}: a tool is refused by name"):
        armed = pydantic_ai.Agent(getattr(models, kind)("chat", provider=PROVIDER), tools=[lambda: "nothing"])
        try:
            armed.run_sync("Write a story.")
            raise RuntimeError("it was not")
        except pydantic_ai.exceptions.ModelHTTPError as error:
            assert error.status_code == 400 and "tool" in str(error.body)

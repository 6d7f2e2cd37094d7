"""openai-agents: an Agent with its default, the responses API, and with the chat API."""

# client openai-agents: openai-agents==0.24.0

import asyncio
import importlib
import os
from typing import Any

from bench.compatibility import tried

agents: Any = importlib.import_module("agents")
openai: Any = importlib.import_module("openai")

agents.set_tracing_disabled(True)
agents.set_default_openai_client(openai.AsyncOpenAI(base_url=os.environ["CHAT_URL"] + "/v1", api_key="none"))
# A small model seldom ends by itself, and what max_tokens cuts short is no answer to openai-agents.
SETTINGS = agents.ModelSettings(temperature=0, max_tokens=40, extra_body={"stop": [" "]})


async def turns(agent: Any) -> Any:
    first = await agents.Runner.run(agent, "Write a story.")
    again = await agents.Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": "Go on."}])
    return first, again


async def streamed(agent: Any) -> tuple[str, list[Any]]:
    run = agents.Runner.run_streamed(agent, "Write a story.")
    events = [event async for event in run.stream_events()]
    return run.final_output, events


with asyncio.Runner() as loop:
    for api in ("responses", "chat_completions"):
        agents.set_default_openai_api(api)
        agent = agents.Agent(name="teller", instructions="Be brief.", model="chat", model_settings=SETTINGS)
        with tried(f"{api}: run, and a second turn") as say:
            first, again = loop.run(turns(agent))
            assert first.final_output and again.final_output
            say(f"{first.context_wrapper.usage.output_tokens} tokens")
        with tried(f"{api}: run_streamed") as say:
            said, events = loop.run(streamed(agent))
            assert said == first.final_output
            say(f"{len(events)} events")
        with tried(f"{api}: a tool is refused by name"):
            armed = agents.Agent(
                name="teller", model="chat", tools=[agents.function_tool(lambda: "x", name_override="x")]
            )
            try:
                loop.run(turns(armed))
                raise RuntimeError("it was not")
            except openai.BadRequestError as error:
                assert error.param == "tools"

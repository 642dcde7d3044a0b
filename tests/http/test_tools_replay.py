"""The engine dies in the middle of calls: their arguments go on as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections import defaultdict
from typing import Any

import openai
import pytest

from tests.http.storm import STORM_S, client_of, metric, ready, strike, until
from tests.http.test_serve import address_of, started

SETTINGS = (
    "model.max_context=4096",
    "model.served_name=fake",
    "scheduler.max_rows=32",
    "engine.restart_backoff_s=0.05",
    "engine=tests.fakes.paced_engine",
)
PATTERN = "[a-z]{40,60}"
PARAMETERS = {
    "type": "object",
    "properties": {"word": {"type": "string", "pattern": f"^{PATTERN}$"}},
    "required": ["word"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {"name": "f", "parameters": PARAMETERS}
NUM_STREAMS = 8

#: Pieces of arguments by stream, as far as they have come.
Heard = dict[int, list[str]]


async def chat(client: openai.AsyncOpenAI, seed: int, heard: Heard) -> None:
    """Streams one call; the first piece heard is its name."""
    stream = await client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        tools=[{"type": "function", "function": FUNCTION}],  # pyright: ignore[reportArgumentType]
        tool_choice="required",
        parallel_tool_calls=False,
        seed=seed,
        stream=True,
    )
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            heard[seed] += [call.function.name or "", call.function.arguments]
        if chunk.choices[0].finish_reason:
            heard[seed].append(chunk.choices[0].finish_reason)


async def response(client: openai.AsyncOpenAI, seed: int, heard: Heard) -> None:
    """The same as a response."""
    stream = await client.responses.create(
        model="fake",
        input="hi",
        tools=[{"type": "function", "strict": True, **FUNCTION}],
        tool_choice="required",
        parallel_tool_calls=False,
        stream=True,
        extra_body={"seed": seed},
    )
    numbers = []
    async for event in stream:
        numbers.append(event.sequence_number)
        if event.type == "response.output_item.added":
            heard[seed].append(event.item.name)
        elif event.type == "response.function_call_arguments.delta":
            heard[seed].append(event.delta)
        elif event.type == "response.completed":
            heard[seed].append("tool_calls")
    assert numbers == list(range(len(numbers)))


async def hear_all(base: str, harm: Any) -> list[str]:
    """What every stream said; `harm` is done once all have begun."""
    heard: Heard = defaultdict(list)
    async with client_of(base) as http:
        await ready(http)
        client = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="x", http_client=http)
        async with asyncio.TaskGroup() as streams:
            for seed in range(NUM_STREAMS):
                streams.create_task((response if seed % 2 else chat)(client, seed, heard))
            await until(lambda: len(heard) == NUM_STREAMS and min(map(len, heard.values())) > 12)
            await harm()
    return ["".join(heard[seed]) for seed in range(NUM_STREAMS)]


@pytest.mark.slow
def test_calls_go_on_where_they_were() -> None:
    async def nothing() -> None:
        """The undisturbed run."""

    with started(*SETTINGS) as process:
        base = address_of(process)

        async def kill() -> None:
            await strike(process.pid, signal.SIGKILL)

        calm = asyncio.run(asyncio.wait_for(hear_all(base, nothing), STORM_S))
        struck = asyncio.run(asyncio.wait_for(hear_all(base, kill), STORM_S))
        assert metric(base, "jaxserve_engine_restarts_total") == 1
        assert metric(base, "jaxserve_requests_replayed_total") >= NUM_STREAMS // 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(STORM_S) == 0
    assert struck == calm and len(set(calm)) == NUM_STREAMS
    for said in calm:
        arguments = said.removeprefix("f").removesuffix("tool_calls")
        assert re.fullmatch(PATTERN, json.loads(arguments)["word"])

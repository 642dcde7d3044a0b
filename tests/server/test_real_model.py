"""The embedded model through the whole server: right, repeatable, and nothing left behind.

Expected tokens and log-probabilities are transformers' (tests/models/oracle.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.models.oracle import MARGIN, TOLERANCE, Oracle
from tests.server.conftest import TIMEOUT_S, Server

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "max_tokens": 24,
    "seed": 11,
    "extra_body": {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def run(server: Server, work: Any) -> Any:
    """Runs `work(client)` on an event loop."""

    async def main() -> Any:
        async with AsyncOpenAI(
            base_url=f"{server.base_url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0
        ) as client:
            return await work(client)

    return asyncio.run(main())


def test_ready_is_not_said_before_everything_is_compiled(server: Server) -> None:
    assert server.starting.status_code == 503
    assert server.starting.json()["status"] in ("starting", "loading", "compiling")
    assert httpx.get(f"{server.base_url}/ready").json() == {"status": "ready"}


def test_greedy_tokens_and_logprobs_are_transformers(server: Server, oracle: Oracle) -> None:
    """All prompts at once: chunked prefill, mixed steps, several decode steps a call."""
    num_steps = oracle.tokens.shape[1]

    async def ask_all(client: AsyncOpenAI) -> list[Any]:
        requests = [
            client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=num_steps,
                temperature=0,
                logprobs=8,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            for prompt in oracle.prompts
        ]
        return await asyncio.gather(*requests)

    compared = 0
    for prompt, answer in enumerate(run(server, ask_all)):
        choice = answer.choices[0]
        assert choice.prompt_token_ids == oracle.prompts[prompt]
        assert len(choice.token_ids) == num_steps
        for step, token in enumerate(choice.token_ids):
            expected = oracle.top_logprobs(prompt, step)
            best = next(iter(expected.values()))
            assert choice.logprobs.token_logprobs[step] == pytest.approx(best, abs=2 * TOLERANCE)
            compared += 1
            if token != oracle.tokens[prompt, step]:
                assert oracle.margin(prompt, step) <= MARGIN, (prompt, step)
                break  # from here on it is another text
    assert compared > 0.95 * oracle.tokens.size
    assert len(oracle.prompts) >= 20


def test_a_seed_gives_the_same_tokens_alone_and_in_company(server: Server) -> None:
    async def ask(client: AsyncOpenAI, **changes: Any) -> str:
        request = {"model": MODEL, "messages": QUESTION, **SAMPLED, **changes}
        answer = await client.chat.completions.create(**request)
        return answer.choices[0].message.content

    async def alone_and_in_company(client: AsyncOpenAI) -> None:
        alone = await ask(client)
        others: list[Coroutine[Any, Any, str]] = [
            ask(
                client,
                seed=seed,
                max_tokens=5 + 3 * seed,
                messages=[{"role": "user", "content": "Tell me about the sea. " * (1 + seed % 7)}],
            )
            for seed in range(20)
        ]
        again, *company = await asyncio.gather(ask(client), *others)
        assert again == alone
        assert len(set(company)) > 10  # other seeds give other tokens

    run(server, alone_and_in_company)


def test_streams_say_what_answers_say(client: OpenAI) -> None:
    request: dict[str, Any] = {"model": MODEL, "messages": QUESTION, **SAMPLED}
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert last.choices == [] and last.usage == whole.usage
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_prompt_logprobs_are_those_of_sampling(client: OpenAI, oracle: Oracle) -> None:
    """A prompt that ends with its own greedy continuation: known log-probabilities."""
    prompt, tokens = oracle.prompts[5], oracle.tokens[5, :16].tolist()
    answer = client.completions.create(
        model=MODEL, prompt=prompt + tokens, max_tokens=0, echo=True, logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == len(prompt) + len(tokens)
    assert logprobs.token_logprobs[0] is None
    for step in range(len(tokens)):
        expected = oracle.top_logprobs(5, step)[tokens[step]]
        assert logprobs.token_logprobs[len(prompt) + step] == pytest.approx(
            expected, abs=2 * TOLERANCE
        )


def test_what_is_found_in_the_cache_gives_the_same_answers(server: Server) -> None:
    """A system prompt of all requests, at once: with one salt for all, and with one for each."""
    system = " ".join(f"Rule {i}: name rule {i} where it applies." for i in range(1, 60))
    questions = [f"\nWhich rule comes after rule {i}?\nAnswer:" for i in range(1, 13)]

    async def ask(client: AsyncOpenAI, salt: str, question: str) -> tuple[str, list[float], int]:
        answer = await client.completions.create(
            model=MODEL,
            prompt=system + question,
            max_tokens=12,
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True, "cache_salt": salt},
        )
        choice, usage = answer.choices[0], answer.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return choice.text, choice.logprobs.token_logprobs, cached  # pyright: ignore[reportReturnType]

    async def ask_all(client: AsyncOpenAI, salts: list[str]) -> list[tuple[str, list[float], int]]:
        pairs = zip(salts, questions, strict=True)
        return await asyncio.gather(*(ask(client, *each) for each in pairs))

    alone = run(server, lambda client: ask_all(client, [f"own {i}" for i in range(12)]))
    run(server, lambda client: ask(client, "shared", "\n"))
    shared = run(server, lambda client: ask_all(client, ["shared"] * 12))
    assert all(cached == 0 for _, _, cached in alone)
    assert all(cached > 600 for _, _, cached in shared)  # all of the system prompt
    for (text, logprobs, _), (known, expected, _) in zip(shared, alone, strict=True):
        assert text == known
        assert logprobs == pytest.approx(expected, abs=2 * TOLERANCE)


def test_two_hundred_streams_are_whole(server: Server) -> None:
    async def read(client: AsyncOpenAI, index: int) -> tuple[int, str | None]:
        stream = await client.completions.create(
            model=MODEL,
            prompt=[1 + (index * 37 + i * 101) % 40000 for i in range(16)],
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        tokens, reason = 0, None
        async for chunk in stream:
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                reason = choice.finish_reason or reason
        return tokens, reason

    async def read_all(client: AsyncOpenAI) -> list[tuple[int, str | None]]:
        return await asyncio.gather(*(read(client, index) for index in range(200)))

    assert run(server, read_all) == [(8, "length")] * 200


def test_a_hundred_hang_ups_leave_no_page_in_use(server: Server) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 900, "stream": True}

    async def hang_up(client: httpx.AsyncClient) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                return

    async def hang_up_all() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=server.base_url, timeout=TIMEOUT_S, limits=limits
        ) as client:
            await asyncio.gather(*(hang_up(client) for _ in range(100)))

    asyncio.run(hang_up_all())
    values = server.metrics()
    while values["jaxserve_running"] + values["jaxserve_waiting"]:  # an answer takes a turn
        values = server.metrics()
    assert values["jaxserve_pages_used"] == 0


def test_nothing_was_compiled_after_start_up(server: Server, client: OpenAI) -> None:
    """Last: after all of the above, and every parameter."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,  # pyright: ignore[reportArgumentType]
        max_tokens=8,
        n=3,
        logit_bias={"504": 5},
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logprobs=True,
        top_logprobs=5,
        stop=["\n"],
        seed=3,
        extra_body={
            "allowed_token_ids": list(range(0, 49152, 2)),
            "bad_words": ["Paris", " is the"],
            "min_tokens": 4,
            "stop_token_ids": [100],
        },
    )
    assert len(answer.choices) == 3
    values = server.metrics()
    assert values["jaxserve_compiles_after_warmup"] == 0
    assert values["jaxserve_engine_ready"] == 1

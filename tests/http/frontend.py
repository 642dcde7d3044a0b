"""An application over the fake engine in a thread, driven from plain tests.

One event loop lives as long as the `Front`; each call runs in it. `oracle_text` says what the
fake model must answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from jaxserve.config import (
    CacheConfig,
    Config,
    EmbeddingsConfig,
    HttpConfig,
    LimitsConfig,
    MeteringConfig,
    ModelConfig,
    SchedulerConfig,
    StructuredConfig,
    ToolsConfig,
    TracingConfig,
)
from jaxserve.engine.thread import EngineThread
from jaxserve.http.adapters import Adapters
from jaxserve.http.app import create_app
from jaxserve.http.auth import KeyRing
from jaxserve.http.observer.reporter import Reporter
from jaxserve.limits.store import Store
from jaxserve.protocol.client import EngineClient
from jaxserve.text.vocabulary import vocabulary_of
from jaxserve.types import SamplingParams
from tests.fakes.embedder import fake_text
from tests.fakes.engine import fake_parts, oracle
from tests.fakes.tokenizer import ByteTokenizer

CONFIG = Config(
    model=ModelConfig(max_context=256, served_name="fake"),
    cache=CacheConfig(page_size=4, num_pages=1000),
    scheduler=SchedulerConfig(max_rows=8, max_step_tokens=32, decode_steps=4, max_waiting=200),
    http=HttpConfig(max_body_bytes=65536, max_choices=16),
)
TIMEOUT_S = 60


class PlainTemplate:
    """A chat template that needs no Jinja: one line a message."""

    source = tools_source = ""
    knows_tools = False

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return "".join(lines) + ("assistant: " if add_generation_prompt else "")


def chat_prompt(content: str) -> list[int]:
    """The tokens of one user message."""
    text = PlainTemplate().render([{"role": "user", "content": content}])
    return ByteTokenizer().encode(text, add_special_tokens=False)


def expected(prompt: list[int], choice: int = 0, **values: Any) -> tuple[list[int], str]:
    """Tokens and text that the fake model answers with."""
    tokens = oracle(prompt, SamplingParams(**({"max_tokens": 16, "seed": 0} | values)), choice)
    return tokens, ByteTokenizer().decode(tokens)


def split_bytes_seed(prompt: list[int], num_tokens: int) -> int:
    """A seed whose answer has a character that is split over two tokens, before its end."""
    tokenizer = ByteTokenizer()
    for seed in range(10_000):
        tokens, text = expected(prompt, seed=seed, max_tokens=num_tokens, ignore_eos=True)
        alone = "".join(tokenizer.token_bytes(t).decode("utf-8", "replace") for t in tokens)
        if any(ord(c) > 127 and c != "\ufffd" for c in text) and text != alone:
            return seed
    raise AssertionError("no such seed")


class Front:
    """An application, its client of the engine, and a loop to run them in."""

    def __init__(
        self,
        engine: EngineThread,
        http: HttpConfig = CONFIG.http,
        keys: KeyRing | None = None,
        limits: LimitsConfig | None = None,
        store: Store | None = None,
        structured: StructuredConfig | None = None,
        tools: ToolsConfig | None = None,
        embeddings: EmbeddingsConfig | None = None,
        adapters: Adapters | None = None,
        reporter: Reporter | None = None,
        tracing: TracingConfig | None = None,
        metering: MeteringConfig | None = None,
        **headers: str,
    ) -> None:
        self.engine = engine
        self._runner = asyncio.Runner()
        self.client = EngineClient(
            engine.connect(), vocabulary=lambda: vocabulary_of(ByteTokenizer())
        )
        self.run(self._start())
        self.app = create_app(
            self.client,
            ByteTokenizer(),
            PlainTemplate(),  # pyright: ignore[reportArgumentType]
            http,
            page_size=CONFIG.cache.page_size,
            keys=keys,
            limits=limits,
            store=store,
            structured=structured,
            tools=tools,
            embeddings=fake_text() if embeddings is not None and embeddings.model else None,
            embeddings_config=embeddings,
            adapters=adapters,
            reporter=reporter,
            tracing=tracing,
            metering=metering,
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://front",
            headers=headers,
        )

    def run[T](self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the loop, within a minute."""
        return self._runner.run(asyncio.wait_for(work, TIMEOUT_S))

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET."""
        return self.run(self.http.get(path, **options))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """POST of a JSON document."""
        if body is not None:
            options["json"] = body
        return self.run(self.http.post(path, **options))

    def ok(self, path: str, body: dict[str, Any]) -> Any:
        """POST of what must succeed; the document."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def close(self) -> None:
        """Ends the client and the loop."""
        self.run(self.http.aclose())
        self.run(self.app.frontend.gate.close())
        self.run(self.app.frontend.grammars.close())
        self.run(self.app.frontend.settling.close())
        self.run(self.client.close())
        self._runner.close()

    async def _start(self) -> None:
        await self.client.start()
        await self.client.ready()


@contextmanager
def front(
    http: HttpConfig = CONFIG.http,
    keys: KeyRing | None = None,
    config: Config = CONFIG,
    *,
    limits: LimitsConfig | None = None,
    store: Store | None = None,
    adapters: Adapters | None = None,
    structured: StructuredConfig | None = None,
    reporter: Reporter | None = None,
    tracing: TracingConfig | None = None,
    metering: MeteringConfig | None = None,
) -> Iterator[Front]:
    """An application over an engine of its own."""
    with EngineThread(config, fake_parts) as engine:
        made = Front(
            *(engine, http, keys, limits, store),
            structured=structured,
            embeddings=config.embeddings,
            adapters=adapters,
            reporter=reporter,
            tracing=tracing,
            metering=metering,
        )
        try:
            yield made
        finally:
            made.close()

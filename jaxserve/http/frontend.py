"""What one HTTP process holds: the client of the engine, the text half of the model, its limits.

Endpoints get this object and nothing global. It says whether work may begin (`model`), turns text
into tokens without stopping the event loop, and counts the requests that drain waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxserve.config import EmbeddingsConfig, HttpConfig
from jaxserve.errors import DeviceFailure, InvalidRequest, ModelNotFound, Overloaded, RequestTimeout
from jaxserve.http.adapters import Adapters
from jaxserve.http.auth import KeyRing
from jaxserve.http.body import read_object
from jaxserve.http.costs import Costs, no_costs
from jaxserve.http.gate import Gate
from jaxserve.http.grammars import GrammarChecker
from jaxserve.http.metrics import Metrics
from jaxserve.http.observer.reporter import NoReporter, Reporter
from jaxserve.http.settling import Settling
from jaxserve.protocol.client import EngineClient
from jaxserve.protocol.streams import RESTARTING
from jaxserve.text.dialect import Dialect
from jaxserve.text.embedding import EmbeddingText
from jaxserve.text.fields import Fields
from jaxserve.text.template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.tool import Toolbox
from jaxserve.types import EmbeddingInfo, ModelInfo

#: Longer texts are tokenized in a thread, so that other streams go on.
INLINE_CHARACTERS = 2048
#: More messages are rendered in a thread; so are larger tools, and their grammars made there.
INLINE_MESSAGES = 64
INLINE_TOOL_BYTES = 8192


@dataclass(kw_only=True)
class Frontend:
    """The parts that endpoints work with.

    Attributes:
        template: None where the model has no chat template.
        dialect: how the model's messages are written and read.
        embeddings: the text half of the model that embeds; None where there is none.
        embeddings_config: limits of its requests.
        page_size: tokens a KV page, to know what the cache can hold.
        started_s: wall clock, the `created` of /v1/models.
        adapters: LoRA adapters by name.
        reporter: where the records of requests go.
        record_content: whether they have what is asked and answered.
        settling: completes them.
        costs: of requests that ask for them, and budgets.
        draining: no new work is taken.
    """

    client: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    dialect: Dialect
    config: HttpConfig
    keys: KeyRing
    gate: Gate
    metrics: Metrics
    grammars: GrammarChecker
    page_size: int
    started_s: int
    embeddings: EmbeddingText | None = None
    embeddings_config: EmbeddingsConfig = field(default_factory=EmbeddingsConfig)
    adapters: Adapters = field(default_factory=Adapters)
    reporter: Reporter = field(default_factory=NoReporter)
    record_content: bool = False
    settling: Settling = field(default_factory=lambda: Settling(NoReporter().ended))
    costs: Costs = field(default_factory=no_costs)
    draining: bool = False
    num_requests: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)
    _reading: set[asyncio.Timeout] = field(default_factory=set)
    _one_large: asyncio.Lock = field(default_factory=asyncio.Lock)

    def model(self) -> ModelInfo:
        """The model, if a request may begin now.

        Raises:
            DeviceFailure: the engine is dead.
            Overloaded: it is not ready yet, or the server drains.
        """
        if self.client.error is not None:
            raise DeviceFailure(self.client.error.message)
        if self.draining:
            raise self._shutting_down()
        status = self.client.status
        if status is not None and status.model is not None and self._waits(status.state):
            return status.model
        if status is None or status.model is None or status.state != "ready":
            state = status.state if status is not None else "starting"
            self.metrics.shed("draining" if state == "draining" else "not_ready")
            raise Overloaded(f"the engine is {state}; wait until /ready answers 200")
        return status.model

    def embedding_model(self) -> EmbeddingInfo:
        """The model that embeds, if a request may begin now.

        Raises:
            ModelNotFound: there is none.
            DeviceFailure, Overloaded: as `model`.
        """
        self.model()
        status = self.client.status
        if self.embeddings is None or status is None or status.embedding is None:
            raise ModelNotFound(
                "no model embeds here: start the server with embeddings.model=minilm, for one"
            )
        return status.embedding

    def _waits(self, state: str) -> bool:
        """Whether a request may wait for an engine that died a moment ago and is started again."""
        return state == RESTARTING and self.client.down_s < self.config.restart_wait_s

    def positions_in_cache(self) -> int:
        """Tokens that the whole page pool holds; a bound where the model's context is larger."""
        status = self.client.status
        return status.pages_total * self.page_size if status is not None else 0

    async def read(self, scope: Any, receive: Any) -> Fields:
        """The body of a request.

        Raises:
            RequestTimeout: it is not there within `http.body_timeout_s`.
            Overloaded: it was not there when the server began to drain.
            JaxserveError: as `read_object`.
        """
        deadline = asyncio.timeout(self.config.body_timeout_s)
        try:
            async with deadline:
                self._reading.add(deadline)
                most = self.config.max_body_bytes
                return await read_object(scope, receive, most, self._one_large)
        except TimeoutError:
            if self.draining:
                raise self._shutting_down() from None
            raise RequestTimeout(
                f"the body was not complete within {self.config.body_timeout_s:g} s: send it "
                "faster, or raise http.body_timeout_s"
            ) from None
        finally:
            self._reading.discard(deadline)

    def drain(self) -> None:
        """Takes no new work from now on, nor what has not come completely."""
        self.draining = True
        now_s = asyncio.get_running_loop().time()
        for deadline in self._reading:
            deadline.reschedule(now_s)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text as token ids."""
        if len(text) <= INLINE_CHARACTERS:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def render(self, messages: list[dict[str, Any]], toolbox: Toolbox, **kwargs: Any) -> str:
        """Messages through the chat template (`Dialect.render`).

        Raises:
            InvalidRequest: the model has none, or it refuses these messages.
        """
        if self.template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or give "
                "model.chat_template at start"
            )
        kwargs["toolbox"] = toolbox
        if len(messages) <= INLINE_MESSAGES and toolbox.num_bytes <= INLINE_TOOL_BYTES:
            return self.dialect.render(self.template, messages, **kwargs)
        return await asyncio.to_thread(self.dialect.render, self.template, messages, **kwargs)

    @asynccontextmanager
    async def checking_grammars(self, model: ModelInfo) -> AsyncIterator[None]:
        """For the time in which a request's grammars are checked, all of them together.

        Raises:
            Overloaded: others are being checked for too long, or these take too long together.
        """
        try:
            await self.grammars.ready(model)
            limit = asyncio.timeout(self.grammars.patience_s)
            try:
                async with limit:
                    yield
            except TimeoutError:
                if not limit.expired():
                    raise
                raise Overloaded(
                    "the request's grammars are not checked yet; try again, or send fewer"
                ) from None
        except Overloaded:
            self.metrics.shed("grammar_checks")
            raise

    def enter(self) -> None:
        """A request has come."""
        self.num_requests += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request has been answered to its end."""
        self.num_requests -= 1
        if self.num_requests == 0:
            self._idle.set()

    async def idle(self) -> None:
        """Waits until no request is being answered."""
        if self.num_requests:
            await self._idle.wait()

    def _shutting_down(self) -> Overloaded:
        self.metrics.shed("draining")
        return Overloaded("the server is shutting down and takes no new requests")

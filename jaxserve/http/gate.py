"""Where requests are let in: deadline, admission and rate limits, around the endpoint's own work.

    gate.glance(…)                 before the body is read
    visit = await gate.enter(…)    before anything is rendered or tokenized
    await visit.begin(work)        before anything is submitted
    visit.leave()                  at the end, whatever way it comes

    async with gate.counted(…)     around a request that runs no model: only counted

Each may raise a refusal. What is to stand in the answer's head is put into the scope's
"jaxserve.headers". A process without limited keys has no limiter, and asks none.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from jaxserve.config import LimitsConfig
from jaxserve.errors import JaxserveError
from jaxserve.http.auth import Identity
from jaxserve.http.body import fingerprint
from jaxserve.http.demand import Demand, ReadDemand, read_demand, read_user
from jaxserve.http.generation import Usage
from jaxserve.http.metrics import Metrics
from jaxserve.http.wire import Work
from jaxserve.limits import deadline
from jaxserve.limits.admission import Admission
from jaxserve.limits.estimate import TokenRatio
from jaxserve.limits.limiter import Limiter, Reservation
from jaxserve.limits.store import Store
from jaxserve.limits.wait import Newcomer
from jaxserve.protocol.client import EngineClient
from jaxserve.text.fields import Fields
from jaxserve.types import SamplingParams

#: Tells clients that their max_tokens was lowered, and to what.
CAPPED_HEADER = b"x-jaxserve-max-tokens"
#: How often the load is looked at where overload gives something up.
LOOK_S = 1.0
_RETRY_HEADER = b"x-stainless-retry-count"  # OpenAI's clients count their repetitions in it


class Gate:
    """The gate of one HTTP process; see the module.

    Args:
        store: of the rate limits; None where no key has any.
        workers: HTTP processes of this server.
    """

    def __init__(
        self,
        client: EngineClient,
        config: LimitsConfig,
        metrics: Metrics,
        store: Store | None = None,
        workers: int = 1,
    ) -> None:
        self.config = config
        self.ratio = TokenRatio()
        self.limiter = Limiter(store, metrics.limited, metrics.shed) if store is not None else None
        self.admission = Admission(
            config,
            status=lambda: client.status,
            refresh=self._refresh,
            count=metrics.shed,
            workers=workers,
        )
        self._client = client
        self._metrics = metrics
        self._asking: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None

    def glance(self, scope: Any, identity: Identity, *, generates: bool = True) -> None:
        """Refuses what no body could make servable in time; notes the headers' earliest deadline.

        Args:
            generates: False for texts to embed, which do not wait with the others: then it is only
                noted.

        Raises:
            Overloaded, DeadlineExceeded: as `Admission`.
            InvalidRequest: the header cannot be read.
        """
        now_s = time.time()
        values = (value for name, value in scope["headers"] if name == deadline.HEADER)
        left_s = min((deadline.read_deadline(value, now_s) for value in values), default=None)
        scope["jaxserve.deadline_s"] = left_s
        if not generates:
            return
        if self._looking is None and self.admission.degrades:
            self._looking = asyncio.create_task(self._look(), name="jaxserve overload")
        best = Newcomer(
            priority=identity.priority_ceiling, tenant=identity.tenant, weight=identity.weight
        )
        self.admission.glance(best, None if left_s is None else _at_ns(scope, left_s))
        self._metrics.overload(self.admission.level, self.admission.normal_wait_s)

    async def enter(
        self,
        scope: Any,
        fields: Fields,
        identity: Identity,
        read: ReadDemand = read_demand,
    ) -> Visit:
        """Lets a request in whose body has been read; raises as `glance`, and `RateLimited`.

        Args:
            read: what it asks for; a demand that generates nothing waits with the texts to embed.
        """
        demand = read(fields, identity)
        left_s = deadline.earliest_s(
            scope["jaxserve.deadline_s"],
            demand.timeout_s,
            default_s=self.config.default_timeout_s,
        )
        deadline_ns = None if math.isinf(left_s) else _at_ns(scope, left_s)
        tokens = self.ratio.estimate(demand.text_bytes) + demand.prompt_tokens
        cap = None
        if demand.max_tokens == 0:
            self.admission.admit_texts(demand.priority, deadline_ns)
        else:
            newcomer = demand.newcomer(identity, tokens // demand.prompts)
            cap = self.admission.admit(newcomer, deadline_ns)
        headers = scope["jaxserve.headers"]
        if cap is not None:
            headers[CAPPED_HEADER] = b"%d" % cap
        reservation = await self._reserve(
            scope, fields, identity, demand.user, self._estimate(demand, tokens, cap, identity)
        )
        return Visit(self, identity, demand, deadline_ns, cap, reservation)

    @contextlib.asynccontextmanager
    async def counted(self, scope: Any, fields: Fields, identity: Identity) -> AsyncIterator[None]:
        """Counts a request that runs no model while it is worked on: as one, and no tokens.

        It takes processor time of this process and nothing of the engine's, so it neither waits
        for the engine nor is refused for it.

        Raises:
            RateLimited: a limit of requests is reached.
        """
        reservation = await self._reserve(scope, fields, identity, read_user(fields), 0)
        try:
            yield
        finally:
            if reservation is not None:
                reservation.settle()

    async def close(self) -> None:
        """Settles what is under way."""
        for task in filter(None, (self._asking, self._looking)):
            task.cancel()
            await asyncio.wait([task])
        if self.limiter is not None:
            await self.limiter.close()

    async def _reserve(
        self, scope: Any, fields: Fields, identity: Identity, user: str, num_tokens: int
    ) -> Reservation | None:
        """Of the rate limits; None where there are none."""
        if self.limiter is None or not identity.quota.is_limited:
            return None
        return await self.limiter.reserve(
            identity.quota,
            user,
            num_tokens,
            fingerprint(fields),
            again=dict(scope["headers"]).get(_RETRY_HEADER, b"0") != b"0",
            headers=scope["jaxserve.headers"],
        )

    def _estimate(self, demand: Demand, tokens: int, cap: int | None, identity: Identity) -> int:
        """What is reserved before the prompt is tokenized.

        What is only guessed of it, the tokens of text and an output that nobody bounded, makes no
        request larger than what is ever given: it may turn out to fit.
        """
        each = demand.max_tokens
        if each is None:
            each = self.config.default_output_tokens
        output_tokens = demand.sequences * (each if cap is None else min(each, cap))
        sure = demand.prompt_tokens + (0 if demand.max_tokens is None else output_tokens)
        return int(max(sure, min(tokens + output_tokens, identity.quota.most_tokens)))

    def _refresh(self) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask(), name="jaxserve load")

    async def _look(self) -> None:
        """Goes on looking at the load while nobody comes."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.admission.look()
            self._metrics.overload(self.admission.level, self.admission.normal_wait_s)

    async def _ask(self) -> None:
        with contextlib.suppress(JaxserveError):  # whoever submits next will be told
            await self._client.get_status()


class Visit:
    """One request that was let in.

    Attributes:
        deadline_ns: CLOCK_MONOTONIC; None where there is none.
        demand: what its body asks for.
    """

    def __init__(
        self,
        gate: Gate,
        identity: Identity,
        demand: Demand,
        deadline_ns: int | None,
        cap: int | None,
        reservation: Reservation | None,
    ) -> None:
        self.deadline_ns = deadline_ns
        self._gate = gate
        self._identity = identity
        self.demand = demand
        self._cap = cap
        self._reservation = reservation
        self._forgiven = False
        self._number: int | None = None  # at the admission, once it goes to the engine

    async def begin(self, work: Work) -> None:
        """The prompts are tokenized: caps their output, and reserves what they really need.

        Raises:
            RateLimited: that is more than is left; the reservation has been given back.
            DeadlineExceeded: it has taken too long.
        """
        demand, gate = self.demand, self._gate
        prompt_tokens = sum(map(len, work.prompts))
        gate.ratio.learn(demand.text_bytes, prompt_tokens - demand.prompt_tokens)
        if self._cap is not None:
            work.samplings = [_capped(sampling, self._cap) for sampling in work.samplings]
        if self._reservation is not None:
            output_tokens = sum(sampling.max_tokens for sampling in work.samplings)
            if demand.max_tokens is None:  # as much as fits, which few will use
                most = len(work.samplings) * gate.config.default_output_tokens
                output_tokens = min(output_tokens, most)
            total = prompt_tokens + output_tokens * work.options.candidates
            if demand.max_tokens is None:  # what it may have at once, and debt if it has more
                total = int(max(prompt_tokens, min(total, self._identity.quota.most_tokens)))
            await self._reservation.true_up(total)
        gate.admission.check_deadline(self.deadline_ns)
        self._number = gate.admission.submitted(
            demand.newcomer(self._identity, prompt_tokens // len(work.prompts))
        )

    async def begin_texts(self, num_tokens: int) -> None:
        """The texts to embed are tokenized; raises as `begin`."""
        demand = self.demand
        self._gate.ratio.learn(demand.text_bytes, num_tokens - demand.prompt_tokens)
        if self._reservation is not None:
            await self._reservation.true_up(num_tokens)
        self._gate.admission.check_deadline(self.deadline_ns)

    def follow(self, usage: Usage) -> None:
        """From now on this is what it uses."""
        if self._reservation is not None:
            self._reservation.follow(
                lambda: 0 if self._forgiven else usage.prompt_tokens + usage.completion_tokens
            )

    def forgive(self) -> None:
        """The engine took nothing of it: its tokens are not counted."""
        self._forgiven = True

    def leave(self) -> None:
        """It has ended."""
        if self._number is not None:
            self._gate.admission.ended(self._number)
        if self._reservation is not None:
            self._reservation.settle()


def _capped(sampling: SamplingParams, cap: int) -> SamplingParams:
    most = max(cap, sampling.min_tokens)
    if sampling.max_tokens <= most:
        return sampling
    return dataclasses.replace(sampling, max_tokens=most)


def _at_ns(scope: Any, left_s: float) -> int:
    """When a time that is counted from the request's arrival is over."""
    return scope["jaxserve.arrived_ns"] + int(left_s * 1e9)

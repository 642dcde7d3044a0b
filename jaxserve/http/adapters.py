"""LoRA adapters over HTTP: which one a request names, and loading and unloading them.

`model` may be the base model's name, an adapter's, or "base:adapter". A request waits for its own
adapter to be fetched, in a thread, and holds the copy until it has been answered.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.errors import (
    AdapterNotFound,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
)
from jaxserve.http.errors import send_json
from jaxserve.lora.registry import Entry, Registry
from jaxserve.protocol.messages import AdapterRef
from jaxserve.text.fields import Fields, show
from jaxserve.types import AdapterBase, ModelInfo

if TYPE_CHECKING:
    from jaxserve.http.frontend import Frontend

#: Between the base model's name and an adapter's.
SEPARATOR = ":"
#: How often a copy that was just fetched may be removed again before it is held.
_TRIES = 3
#: Adapters that are fetched at once.
_THREADS = 16
#: How long an unload waits for the requests that run.
UNLOAD_WAIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Pick:
    """What a request's `model` stands for.

    Attributes:
        model: the base, under the name that the answer gives it.
        adapter: its name; None for the base alone.
    """

    model: ModelInfo
    adapter: str | None = None


class Adapters:
    """Those of one HTTP process.

    Args:
        registry: shared with the other processes; None where adapters are off.
    """

    def __init__(self, registry: Registry | None = None) -> None:
        self._registry = registry
        self._fetching: dict[str, asyncio.Task[str]] = {}
        # Of their own: a slow store holds up no tokenizing, which has the event loop's threads.
        self._threads = ThreadPoolExecutor(_THREADS, "jaxserve adapters")

    @property
    def registry(self) -> Registry:
        """Where the names are.

        Raises:
            InvalidRequest: adapters are off.
        """
        if self._registry is None:
            raise InvalidRequest("adapters are off here: set lora.enabled=true")
        return self._registry

    async def run[**P, T](
        self, work: Callable[P, T], /, *arguments: P.args, **named: P.kwargs
    ) -> T:
        """Does what waits for files and stores, in a thread."""
        call = functools.partial(work, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def names(self) -> dict[str, Entry]:
        """All that are known now."""
        return self._registry.names() if self._registry is not None else {}

    async def look_up(self, name: str, model: ModelInfo) -> tuple[str, Entry] | None:
        """The adapter that a request with this `model` would use, and its own name."""
        if self._registry is None:
            return None
        adapter = name.removeprefix(f"{model.name}{SEPARATOR}")
        known = self._registry.names().get(adapter)
        try:
            return adapter, known or await self.run(self._registry.look_up, adapter)
        except AdapterNotFound:
            return None

    def pick(self, fields: Fields, model: ModelInfo) -> Pick:
        """What a body's `model` stands for; naming none is the base.

        Raises:
            ModelNotFound: neither the base model nor an adapter has that name.
        """
        name = fields.text("model")
        if name is None or name == model.name:
            return Pick(model)
        if self._registry is None:
            raise ModelNotFound(
                f"model {show(name)} is not served here; {model.name!r} is", param="model"
            )
        adapter = name.removeprefix(f"{model.name}{SEPARATOR}")
        try:
            self._registry.find(adapter)
        except AdapterNotFound as error:
            raise AdapterNotFound(
                f"model {show(name)} is not served here: it is neither {model.name!r} nor one of "
                "its adapters",
                param="model",
            ) from error
        return Pick(dataclasses.replace(model, name=name), adapter)

    @asynccontextmanager
    async def using(
        self, pick: Pick, deadline_ns: int | None = None
    ) -> AsyncIterator[AdapterRef | None]:
        """The adapter of a request, fetched if need be, for as long as it is answered.

        Raises:
            DeadlineExceeded: it was not there in time; it is fetched to the end all the same.
            AdapterNotFound: its name was taken away meanwhile.
            InvalidAdapter: it cannot be fetched, or does not fit the base model.
        """
        if pick.adapter is None:
            yield None
            return
        disk = self.registry.disk
        left_s = None
        if deadline_ns is not None:
            left_s = max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)
        waiting = asyncio.timeout(left_s)
        try:
            async with waiting:
                key = await self._hold(pick.adapter, base_of(pick.model))
        except TimeoutError:
            if not waiting.expired():
                raise
            raise DeadlineExceeded(
                f"the request's deadline passed before adapter {pick.adapter!r} was there"
            ) from None
        try:
            yield AdapterRef(key=key, path=str(disk.path(key)))
        finally:
            disk.release(key)

    async def _hold(self, name: str, base: AdapterBase) -> str:
        registry = self.registry
        key = registry.find(name).key
        for _ in range(_TRIES):
            if key and registry.disk.hold(key):
                return key
            key = await self._fetch(name, base)
        raise Overloaded(
            f"the copy of adapter {name!r} is removed as soon as it is made: raise lora.cache_bytes"
        )

    async def _fetch(self, name: str, base: AdapterBase) -> str:
        """Once for all requests that wait for it; goes on where one of them leaves."""
        task = self._fetching.get(name)
        if task is None:
            work = self.run(self.registry.materialise, name, base)
            task = self._fetching[name] = asyncio.create_task(work)
            task.add_done_callback(lambda done: self._fetched(name, done))
        return await asyncio.shield(task)

    def _fetched(self, name: str, task: asyncio.Task[str]) -> None:
        del self._fetching[name]
        if not task.cancelled():
            task.exception()  # those that waited raise it; nobody may have


class LoadAdapter:
    """/v1/load_lora_adapter: gives a name to an adapter, after checking it against the base."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers once new requests may use it."""
        frontend = self._frontend
        model = frontend.model()
        fields = await frontend.read(scope, receive)
        name, source = _text(fields, "lora_name"), _text(fields, "lora_path")
        replace = fields.flag("load_inplace", False)
        fields.neutral("lora_int_id")
        fields.neutral("is_3d_lora_weight", False)
        fields.finish()
        registry, base = frontend.adapters.registry, base_of(model)
        _check_free(frontend, model, name)
        entry = await frontend.adapters.run(registry.load, name, source, base, replace=replace)
        await send_json(send, adapter_card(name, entry, model, frontend.started_s))


class UnloadAdapter:
    """/v1/unload_lora_adapter: takes a name away; waits for what runs, or refuses."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers once no request runs with it, or at once where that was to be refused."""
        frontend = self._frontend
        frontend.model()
        fields = await frontend.read(scope, receive)
        name = _text(fields, "lora_name")
        in_use = fields.text("in_use", "wait")
        if in_use not in ("wait", "refuse"):
            raise fields.wrong("in_use", '"wait" or "refuse"', in_use)
        fields.neutral("lora_int_id")
        fields.finish()
        registry = frontend.adapters.registry
        refuse = in_use == "refuse"
        entry = await frontend.adapters.run(registry.unload, name, refuse_in_use=refuse)
        ended = True
        if entry.key and not refuse:
            ended = await registry.disk.await_unused(entry.key, UNLOAD_WAIT_S)
        await send_json(send, {"id": name, "object": "model", "deleted": True, "ended": ended})


def adapter_card(name: str, entry: Entry, model: ModelInfo, created_s: int) -> dict[str, Any]:
    """An adapter's row in /v1/models."""
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "jaxserve",
        "max_model_len": model.max_context,
        "parent": model.name,
        "root": entry.source,
        "hash": entry.key or None,
    }


def base_of(model: ModelInfo) -> AdapterBase:
    """What the engine says an adapter must fit.

    Raises:
        InvalidRequest: it has no slots for adapters.
    """
    if model.adapters is None:
        raise InvalidRequest("adapters are off here: set lora.enabled=true")
    return model.adapters


def _check_free(frontend: Frontend, model: ModelInfo, name: str) -> None:
    """Refuses names of models: `model` would then mean two things."""
    if name == model.name:
        raise InvalidRequest(f"{name!r} is the base model's name", param="lora_name")
    status = frontend.client.status
    if status is not None and status.embedding is not None and name == status.embedding.name:
        raise InvalidRequest(f"{name!r} is the name of the model that embeds", param="lora_name")


def _text(fields: Fields, name: str) -> str:
    value = fields.text(name)
    if not value:
        raise fields.wrong(name, "a string that is not empty", value)
    return value

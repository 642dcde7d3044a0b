"""What the engine tells of its state, now: gathered from its parts when a client asks."""

from __future__ import annotations

import os
import time
from collections import Counter

from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.backlog import Backlog
from jaxserve.engine.embedding import Embedding
from jaxserve.engine.lobby import Lobby
from jaxserve.engine.turn import Executor
from jaxserve.protocol.status import EngineStatus
from jaxserve.scheduler.copies import Schedulers
from jaxserve.types import DeviceInfo, ModelInfo


class Status:
    """The parts that know it.

    Args:
        model, device: as the engine has them.
        scheduler, executor, lobby, adapters, backlog, embedding: whose state it is.

    Attributes:
        shed: sequences that were refused before any of them was asked, by reason.
    """

    def __init__(
        self,
        model: ModelInfo,
        device: DeviceInfo | None,
        *,
        scheduler: Schedulers,
        executor: Executor,
        lobby: Lobby,
        adapters: RequestAdapters,
        backlog: Backlog,
        embedding: Embedding,
    ) -> None:
        self.shed: Counter[str] = Counter()
        self._model = model
        self._device = device
        self._scheduler = scheduler
        self._executor = executor
        self._lobby = lobby
        self._adapters = adapters
        self._backlog = backlog
        self._embedding = embedding

    def of(self, state: str, step_ns: int, error: str) -> EngineStatus:
        """The engine's state.

        Args:
            step_ns: when the loop last turned.
            error: what ended it.
        """
        return EngineStatus(
            state=state,
            pid=os.getpid(),
            step_age_s=(time.monotonic_ns() - step_ns) / 1e9,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting + self._lobby.num_held,
            pages_used=self._scheduler.pages_used,
            pages_total=self._scheduler.pages_total,
            pages_cached=self._scheduler.pages_cached,
            prefix_lookup_tokens=self._scheduler.prefix_lookup_tokens,
            prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
            swapped=self._scheduler.num_swapped,
            host_pages_used=self._scheduler.host_pages_used,
            host_pages_total=self._scheduler.host_pages_total,
            compiles_after_warmup=self._executor.compiles_after_warmup,
            model=self._model,
            shed=dict(
                self.shed + Counter(self._scheduler.num_shed) + Counter(self._embedding.num_shed)
            ),
            error=error,
            at_ns=time.monotonic_ns(),
            max_rows=self._scheduler.max_rows,
            loads=self._backlog.loads(self._scheduler.running()),
            prefill_tokens_per_s=self._backlog.prefill_tokens_per_s,
            service_s=self._backlog.service_s,
            token_s=self._backlog.token_s,
            output_share=self._backlog.output_share,
            embedding=self._embedding.model,
            texts_waiting=self._embedding.num_waiting,
            embed_wait_s=self._embedding.wait_s,
            adapter_slots=self._scheduler.num_adapter_slots,
            adapters_held=self._scheduler.num_adapters_held,
            adapter_joins=self._scheduler.num_adapter_joins,
            adapter_hits=self._scheduler.num_adapter_hits,
            adapter_loads=self._adapters.num_loads,
            adapter_host_bytes=self._adapters.host_bytes,
            device=self._device,
        )

"""Requests with LoRA adapters: each waits for its own adapter, and for no other.

A request names its adapter by the hash of its content, and where it lies on the disk. One that is
not in the host's memory is loaded beside the step loop (`lora.host`), while its requests wait here
as messages; then they go to the scheduler, which finds slots for them. From then on the adapter is
used until the request's last sequence has ended, so that it can be put into a slot whenever the
scheduler says so, also after its name has come to mean another one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

from jaxserve.engine.held import HeldRequests
from jaxserve.errors import InvalidRequest, JaxserveError
from jaxserve.lora.host import HostAdapters, Ready
from jaxserve.protocol.messages import Embed, Finished, Submit
from jaxserve.scheduler.sequence import AdapterUse, Sequence
from jaxserve.types import FinishReason

_KEY = re.compile("[0-9a-f]{32}")


class RequestAdapters:
    """The adapters of live requests.

    Args:
        host: those in the host's memory; None where there are no adapters.
    """

    def __init__(self, host: HostAdapters | None = None) -> None:
        self._host = host
        self._held: HeldRequests[Submit] = HeldRequests("adapter")

    @property
    def num_held(self) -> int:
        """Sequences that wait here."""
        return self._held.num_sequences

    @property
    def is_loading(self) -> bool:
        """Whether the loop has to look here again soon."""
        return self._host is not None and self._host.is_loading

    @property
    def num_loads(self) -> int:
        """From the disk, so far."""
        return self._host.num_loads if self._host is not None else 0

    @property
    def host_bytes(self) -> int:
        """In the host's memory."""
        return self._host.num_bytes if self._host is not None else 0

    def arrays(self, key: str) -> Any:
        """What the device is given of an adapter that is used."""
        assert self._host is not None
        return self._host.get(key).arrays

    def holds(self, client: Hashable, message: Submit) -> bool:
        """Whether a request has to wait for its adapter; it is kept then.

        Raises:
            InvalidRequest: there are no adapters here, or its is named wrongly.
        """
        if message.adapter is None:
            return False
        if self._host is None:
            raise InvalidRequest("adapters are off: set lora.enabled=true", param="model")
        key = message.adapter.key
        if not _KEY.fullmatch(key):
            raise InvalidRequest(f"adapter {key[:40]!r} is not named by a hash", param="model")
        if self._host.use(key, Path(message.adapter.path), len(message.sequence_ids)) is not None:
            return False
        self._held.add(client, message)
        return True

    def release(self) -> list[tuple[tuple[Hashable, Submit], JaxserveError | None]]:
        """Requests whose adapters are here now, or will not come; called each turn of the loop."""
        if self._host is None or not self._host.is_loading:
            return []
        released: list[tuple[tuple[Hashable, Submit], JaxserveError | None]] = []
        for key, ended in self._host.poll().items():
            error = ended if isinstance(ended, JaxserveError) else None
            released += [(held, error) for held in self._held.take(lambda m, k=key: _key(m) == k)]
        return released

    def waits(self, request_keys: Collection[str]) -> bool:
        """Whether one of these requests waits here."""
        return self._held.has_any(request_keys)

    def use_of(self, message: Submit) -> AdapterUse | None:
        """What the scheduler is told of a request that need not wait."""
        if message.adapter is None:
            return None
        assert self._host is not None
        ready: Ready = self._host.get(message.adapter.key)
        return AdapterUse(key=message.adapter.key, rank_class=ready.rank_class)

    def ended(self, sequence: Sequence) -> None:
        """A sequence that was let in has ended."""
        if sequence.adapter is not None and self._host is not None:
            self._host.leave(sequence.adapter.key)

    def refused(self, message: Submit | Embed) -> None:
        """A request that `holds` has seen is not let in."""
        if isinstance(message, Embed) or message.adapter is None:
            return
        if self._host is not None:
            self._host.leave(message.adapter.key, len(message.sequence_ids))

    def withdraw(
        self, client: Hashable, sequence_ids: Collection[int], reason: FinishReason
    ) -> list[Finished]:
        """As `HeldRequests.withdraw`."""
        ends = []
        for message, end in self._held.withdraw(client, sequence_ids, reason):
            self.withdrawn(message)
            ends.append(end)
        return ends

    def forget(self, client: Hashable) -> None:
        """A client is gone."""
        for message in self._held.forget(client):
            for _ in message.sequence_ids:
                self.withdrawn(message)

    def withdrawn(self, message: Submit) -> None:
        """A sequence of a request that `holds` has seen is not let in."""
        if message.adapter is not None and self._host is not None:
            self._host.leave(message.adapter.key)


def _key(message: Submit) -> str:
    assert message.adapter is not None
    return message.adapter.key

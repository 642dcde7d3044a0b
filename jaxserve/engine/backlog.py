"""What the engine tells of its load, by which the front end says how long a request would wait.

Counts are kept as sequences come and end, so that telling them costs nothing for those that wait;
rates are averages over about the last `_MEMORY` steps and sequences.
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.protocol.status import ClassLoad
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason

#: Classes that are told one by one; the rest is added together.
MAX_CLASSES = 64
#: A step this long after the one before did not follow it.
_GAP_NS = 1_000_000_000
_MEMORY = 64


class Backlog:
    """The sequences that have not ended, by class, and how fast they are served."""

    def __init__(self) -> None:
        self._classes: dict[Sequence, ClassLoad] = {}
        self._live: dict[tuple[int, str], ClassLoad] = {}
        self._last_ns = 0
        self._prefilled = _Ratio()
        self._held = _Ratio()
        self._outputs = _Ratio()
        self._shares = _Ratio()

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed a second, in steps that had some."""
        return self._prefilled.value * 1e9

    @property
    def service_s(self) -> float:
        """How long a sequence holds a row."""
        return self._held.value / 1e9

    def rate(self, num_running: int) -> float:
        """Rows that become free in a second while so many are taken; 0 before any has."""
        return num_running / self.service_s if self.service_s else 0.0

    @property
    def token_s(self) -> float:
        """The same, for each of its output tokens."""
        return self._outputs.value / 1e9

    @property
    def output_share(self) -> float:
        """The part of its max_tokens that a sequence uses."""
        return self._shares.value

    def enter(
        self, sequences: list[Sequence], priority: int, tenant: str, weight: float = 1.0
    ) -> None:
        """Sequences were let in."""
        load = self._live.get((priority, tenant))
        if load is None:
            load = ClassLoad(priority=priority, tenant=tenant)
            self._live[priority, tenant] = load
        load.weight = weight
        load.waiting += len(sequences)
        for sequence in sequences:
            self._classes[sequence] = load
            load.tokens += sequence.prompt_len

    def leave(self, sequence: Sequence, now_ns: int) -> None:
        """A sequence has ended."""
        load = self._classes.pop(sequence)
        load.waiting -= 1
        load.tokens -= sequence.prompt_len
        if not load.waiting:
            del self._live[load.priority, load.tenant]
        if sequence.scheduled_ns:
            held_ns = now_ns - sequence.scheduled_ns
            self._held.add(held_ns, 1)
            self._outputs.add(held_ns, max(sequence.num_outputs, 1))
            if sequence.reason is not FinishReason.CANCELLED:
                self._shares.add(sequence.num_outputs, sequence.sampling.max_tokens)

    def wake(self, now_ns: int) -> None:
        """A step is launched on a device that had nothing to do: it begins now."""
        self._last_ns = now_ns

    def step(self, now_ns: int, prefill_tokens: int) -> None:
        """A step's tokens were read; it computed so many of prompts."""
        since_ns, self._last_ns = now_ns - self._last_ns, now_ns
        if prefill_tokens and since_ns < _GAP_NS:
            self._prefilled.add(prefill_tokens, since_ns)

    def loads(self, running: Iterable[Sequence]) -> list[ClassLoad]:
        """The load by class.

        Args:
            running: the sequences that hold a row.
        """
        told = {
            key: ClassLoad(
                priority=load.priority,
                tenant=load.tenant,
                weight=load.weight,
                waiting=load.waiting,
                tokens=load.tokens,
            )
            for key, load in self._live.items()
        }
        for sequence in running:
            load = self._classes.get(sequence)
            if load is None:
                continue
            own = told[load.priority, load.tenant]
            own.running += 1
            own.waiting -= 1
            computed = len(sequence.token_ids) - sequence.num_computed
            own.tokens += max(computed, 0) - sequence.prompt_len
        loads = [*told.values()]
        if len(loads) <= MAX_CLASSES:
            return loads
        loads.sort(key=_size, reverse=True)
        kept, rest = loads[: MAX_CLASSES - 1], loads[MAX_CLASSES - 1 :]
        merged = ClassLoad(priority=min(load.priority for load in rest), tenant="", weight=0.0)
        for load in rest:
            merged.weight += load.weight
            merged.running += load.running
            merged.waiting += load.waiting
            merged.tokens += load.tokens
        return [*kept, merged]


class _Ratio:
    """A sum over another, the old ones fading."""

    def __init__(self) -> None:
        self._over = self._under = 0.0

    @property
    def value(self) -> float:
        return self._over / self._under if self._under else 0.0

    def add(self, over: float, under: float) -> None:
        self._over += over - self._over / _MEMORY
        self._under += under - self._under / _MEMORY


def _size(load: ClassLoad) -> int:
    return load.waiting + load.running

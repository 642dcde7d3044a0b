"""What the ledger holds: a line for each request, and for each hour the lines that are nobody's.

Money is `Decimal`, in the configured currency. An hour's lines add up: what its requests cost, what
was wasted, and what stood idle are what its hardware and energy cost.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from decimal import Decimal

ZERO = Decimal(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What one request came to, or several.

    Attributes:
        prefill_device_ns, decode_device_ns: its share of the device's time; wasted_device_ns: for
            what had to be computed again or was thrown away, which it is not charged for.
        energy_j: its share of the energy measured or modelled; carbon_g: of CO2.
        prefill_cost, decode_cost: their sum is what it cost.
        wasted_cost: on the hour's line of waste.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_device_ns: int = 0
    decode_device_ns: int = 0
    wasted_device_ns: int = 0
    energy_j: float = 0.0
    carbon_g: float = 0.0
    prefill_cost: Decimal = ZERO
    decode_cost: Decimal = ZERO
    wasted_cost: Decimal = ZERO

    @property
    def cost(self) -> Decimal:
        """What is charged."""
        return self.prefill_cost + self.decode_cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Measures):
    """One request.

    Attributes:
        request_id: the same one is counted once, however often it is added.
        ended_s: wall clock, seconds since 1970, UTC.
        outcome: a `protocol.records.Outcome`.
    """

    request_id: str
    ended_s: float
    route: str
    outcome: str
    model: str = ""
    adapter: str = ""
    tenant: str = ""
    key: str = ""
    user: str = ""


class LineKind(enum.StrEnum):
    """What a line of an hour is for."""

    HARDWARE = "hardware"  # the price of the machine's time
    ENERGY = "energy"  # the price of the energy it took, PUE included
    BUSY = "busy"  # of both, what steps took: requests' costs and waste are shares of it
    IDLE = "idle"  # of both, the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one kind came to in an hour, so far as it was not added before: lines are increments.

    Attributes:
        source: who measured it, unique to a life of a server; number: rises within it. A line of
            the same source and number is counted once.
        hour: since 1970, UTC.
    """

    source: str
    number: int
    hour: int
    kind: LineKind
    duration_ns: int = 0
    energy_j: float = 0.0
    carbon_g: float = 0.0
    cost: Decimal = ZERO

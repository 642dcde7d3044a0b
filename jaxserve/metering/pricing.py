"""What a request costs: its share of the device's time, at the rate of the moment.

A nanosecond of the device costs what the machine costs in it, and the energy that the device takes
while it works. Prefill and decode are priced by the time that each took; tokens whose KV was found
take none, so they cost next to nothing. Waste (positions computed again, tokens thrown away) is
priced apart and not charged.

A request is priced once: in the front end where its answer tells the price, else by the observer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from jaxserve.metering.entry import Entry
from jaxserve.metering.prices import SMALLEST, Prices
from jaxserve.protocol.records import RequestCost, RequestRecord


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What the device's time costs now.

    Attributes:
        watts: that the devices take while they work.
    """

    prices: Prices
    watts: float

    def price(self, record: RequestRecord) -> RequestCost:
        """What a request costs whose sequences have ended."""
        prefill_ns = decode_ns = wasted_ns = 0
        for share in record.sequences:
            prefill_ns += share.prefill_device_ns
            decode_ns += share.decode_device_ns
            wasted_ns += share.wasted_device_ns
        energy_j = self.watts * (prefill_ns + decode_ns) / 1e9
        return RequestCost(
            currency=self.prices.currency,
            prefill=self.cost(prefill_ns),
            decode=self.cost(decode_ns),
            wasted=self.cost(wasted_ns),
            prefill_device_ns=prefill_ns,
            decode_device_ns=decode_ns,
            wasted_device_ns=wasted_ns,
            energy_j=energy_j,
            carbon_g=energy_j * self.prices.carbon_g_per_j,
        )

    def cost(self, device_ns: int) -> Decimal:
        """Of so much of the device's time."""
        return (self._per_ns * device_ns).quantize(SMALLEST)

    @cached_property
    def _per_ns(self) -> Decimal:
        energy = self.prices.energy_per_j * Decimal(self.watts) / 10**9
        return self.prices.hardware_per_ns + energy

    def to_json(self) -> bytes:
        """As it is told to the workers."""
        return json.dumps({"watts": self.watts}).encode()

    @classmethod
    def from_json(cls, prices: Prices, body: bytes) -> Rate:
        """As it was told."""
        return cls(prices=prices, watts=json.loads(body)["watts"])


def entry_of(record: RequestRecord, cost: RequestCost, ended_s: float) -> Entry:
    """A request's line in the ledger.

    Args:
        ended_s: wall clock.
    """
    return Entry(
        request_id=record.request_id,
        ended_s=ended_s,
        route=record.route,
        outcome=record.outcome.value,
        model=record.model,
        adapter=record.adapter,
        tenant=record.tenant,
        key=record.key,
        user=record.user,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        completion_tokens=record.completion_tokens,
        prefill_device_ns=cost.prefill_device_ns,
        decode_device_ns=cost.decode_device_ns,
        wasted_device_ns=cost.wasted_device_ns,
        energy_j=cost.energy_j,
        carbon_g=cost.carbon_g,
        prefill_cost=cost.prefill,
        decode_cost=cost.decode,
        wasted_cost=cost.wasted,
    )

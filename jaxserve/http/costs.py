"""What requests cost, as far as an HTTP worker has to know: the price in an answer, and budgets.

The observer tells the rate (`metering.pricing`) and what tenants have spent. A request that asks
for its cost (`include_cost`) is priced here, when the engine has said its last word, and its record
keeps the price, so that the ledger has the amount that the client was told. A tenant that has spent
its month's hard budget is refused before anything is read; past the soft one its answers say so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from jaxserve.config import MeteringConfig
from jaxserve.errors import BudgetExceeded, BudgetLimited, InvalidRequest
from jaxserve.http.auth import Identity
from jaxserve.http.generation import Usage
from jaxserve.http.records import record_of
from jaxserve.http.settling import note_sequences
from jaxserve.metering.budgets import end_of
from jaxserve.metering.power.modelled import modelled_device
from jaxserve.metering.prices import make_prices
from jaxserve.metering.pricing import Rate
from jaxserve.protocol.records import RequestCost
from jaxserve.text.fields import Fields

FIELD = "include_cost"
_WANTED = "jaxserve.include_cost"
COST_HEADER = b"x-request-cost"
#: Of a tenant past its soft limit: what it may spend in the month, what it has, when that ends.
LIMIT_HEADER, SPENT_HEADER, RESET_HEADER = (
    b"x-budget-limit",
    b"x-budget-spent",
    b"x-budget-reset",
)


class Costs:
    """One worker's view; see the module.

    Args:
        config: prices.
        told: what the observer said last about a topic.
        enabled: whether anybody keeps costs.
        wall_s: seconds since 1970.
    """

    def __init__(
        self,
        config: MeteringConfig,
        told: Callable[[str], bytes | None],
        *,
        enabled: bool,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._told = told
        self._enabled = enabled
        self._wall_s = wall_s
        self._prices = make_prices(config)
        # Until the observer has said what is measured.
        watts = modelled_device(config).busy_w * config.devices
        self._rate = Rate(prices=self._prices, watts=watts)
        self._rate_body: bytes | None = None
        self._budgets: dict[str, Any] = {}
        self._budgets_body: bytes | None = None

    def read(self, scope: Any, fields: Fields) -> None:
        """Notes whether a request asks for its cost.

        Raises:
            InvalidRequest: it says neither yes nor no, or nobody computes costs here.
        """
        wanted = fields.flag(FIELD, False)
        if wanted and not self._enabled:
            raise InvalidRequest(
                "costs are not computed here: start the server with metering.enabled=true and "
                "telemetry.enabled=true, or leave include_cost out",
                param=FIELD,
            )
        scope[_WANTED] = wanted

    def tell(self, scope: Any, usage: Usage) -> None:
        """Prices a request that asked for it and whose streams have ended.

        The price goes into its usage and its record, and into the answer's head if there is time.
        """
        if not scope[_WANTED]:
            return
        record = record_of(scope)
        note_sequences(record, scope["jaxserve.streams"])
        usage.cost = record.cost = self.rate.price(record)
        scope["jaxserve.headers"][COST_HEADER] = cost_header(usage.cost)

    @property
    def rate(self) -> Rate:
        """What the device's time costs now."""
        body = self._told("rate")
        if body is not None and body is not self._rate_body:
            self._rate_body = body
            self._rate = Rate.from_json(self._prices, body)
        return self._rate

    def admit(self, scope: Any, identity: Identity) -> None:
        """Lets a request in whose tenant has money left; past the soft limit its answer says so.

        Raises:
            BudgetExceeded: it has not.
        """
        budget = identity.budget
        body = self._told("budgets") if budget is not None else None
        if budget is None or body is None:
            return
        if body is not self._budgets_body:
            self._budgets_body, self._budgets = body, json.loads(body)
        spent = Decimal(self._budgets["spent"].get(identity.tenant, "0"))
        now_s, end = self._wall_s(), end_of(self._budgets["month"])
        limits = [limit for limit in (budget.soft, budget.hard) if limit is not None]
        if spent < limits[0] or end.timestamp() <= now_s:
            return
        headers = scope["jaxserve.headers"]
        until = end.strftime("%Y-%m-%dT%H:%M:%SZ")
        headers[LIMIT_HEADER] = f"{limits[-1]:f}".encode()
        headers[SPENT_HEADER] = f"{spent:.6f}".encode()
        headers[RESET_HEADER] = until.encode()
        if budget.hard is not None and spent >= budget.hard:
            kind = BudgetLimited if self._config.over_budget_status == "429" else BudgetExceeded
            currency = self._prices.currency
            raise kind(
                f"the tenant has spent {spent:.2f} {currency} this month, its budget is "
                f"{budget.hard:f} {currency}; it begins again at {until}, or ask for a larger one",
                retry_after_s=end.timestamp() - now_s,
            )


def no_costs() -> Costs:
    """Where nobody keeps them."""
    return Costs(MeteringConfig(), lambda topic: None, enabled=False)


def cost_header(cost: RequestCost) -> bytes:
    """`x-request-cost`: the amount, as the ledger has it, and its currency."""
    return f"{cost.total:f} {cost.currency}".encode()

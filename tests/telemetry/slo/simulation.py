"""A server's traffic without a server: requests as records, under clocks that a test turns."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from jaxserve.config import SloConfig
from jaxserve.protocol.records import Asked, Begun, FirstToken, Outcome, RequestRecord
from jaxserve.telemetry.slo.compliance import Compliance

CHAT = "/v1/chat/completions"
S = 10**9
MS = 10**6


class Clocks:
    """CLOCK_MONOTONIC and the wall clock of one machine."""

    def __init__(self, boot: str = "boot") -> None:
        self.ns = 1_000_000 * S
        self.wall_offset_s = 1_800_000_000.0
        self.boot = boot

    def monotonic_ns(self) -> int:
        return self.ns

    def wall_s(self) -> float:
        return self.ns / 1e9 + self.wall_offset_s

    def advance(self, seconds: float) -> None:
        self.ns += int(seconds * S)

    def reboot(self, seconds: float) -> None:
        """The machine is off for a while; its monotonic clock begins anew."""
        wall_s = self.wall_s() + seconds
        self.ns, self.boot = 10 * S, self.boot + "+"
        self.wall_offset_s = wall_s - self.ns / 1e9


class Alarm:
    """Remembers what alerts were told, and when."""

    def __init__(self, clocks: Clocks) -> None:
        self.told: list[tuple[int, str, bool]] = []
        self.details: list[dict[str, Any]] = []
        self._clocks = clocks

    def __call__(
        self, key: str, firing: bool, severity: str, title: str, details: dict[str, Any]
    ) -> None:
        self.told.append((self._clocks.ns, key, firing))
        self.details.append(details | {"severity": severity, "title": title})

    @property
    def pages(self) -> list[tuple[int, str, bool]]:
        return [told for told in self.told if "page" in told[1]]


class Server:
    """SLOs, and the requests that they see.

    Attributes:
        compliance: replaced by `restart`.
    """

    def __init__(self, directory: Path, *objectives: str, clocks: Clocks | None = None, **settings):
        self.clocks = clocks or Clocks()
        self.alarm = Alarm(self.clocks)
        self.num_requests = 0
        self._directory = directory
        self._settings = settings
        self.compliance = self._open(objectives, "1")

    def _open(self, objectives: tuple[str, ...], life: str) -> Compliance:
        self.objectives = objectives
        self.life = life
        return Compliance(
            SloConfig(objectives=objectives, **self._settings),
            self._directory,
            life=life,
            on_alert=self.alarm,
            monotonic_ns=self.clocks.monotonic_ns,
            wall_s=self.clocks.wall_s,
            boot=self.clocks.boot,
        )

    def flush(self) -> None:
        asyncio.run(self.compliance.flush())

    def restart(self, *objectives: str, same_server: bool = False, flushed: bool = True) -> None:
        """The observer ends and begins again, with its server unless it is the same one."""
        if flushed:
            self.flush()
        self.compliance.close()
        life = self.life if same_server else self.life + "+"
        self.compliance = self._open(objectives or self.objectives, life)

    def begin(self, **values) -> Begun:
        """A request that arrives now and does not end by itself."""
        self.num_requests += 1
        labels = {"route": CHAT, "model": "m"} | values
        begun = Begun(request_id=f"{self.num_requests:032x}", arrived_ns=self.clocks.ns, **labels)
        self.compliance.begun(begun)
        return begun

    def first_token(self, begun: Begun) -> None:
        self.compliance.first_token(FirstToken(request_id=begun.request_id, at_ns=self.clocks.ns))

    def end(self, begun: Begun | None = None, **values) -> RequestRecord:
        """A request that ends now, one that came just before where none is given."""
        if begun is None:
            self.num_requests += 1
            begun = Begun(
                request_id=f"{self.num_requests:032x}",
                arrived_ns=self.clocks.ns - 50 * MS,
                route=CHAT,
                model="m",
            )
        record = ended(begun, self.clocks.ns, **values)
        self.compliance.ended(record)
        return record

    def run(self, seconds: int, *outcomes: Outcome) -> None:
        """Each second these requests end, and a tick."""
        for _ in range(seconds):
            for outcome in outcomes:
                self.end(outcome=outcome)
            self.clocks.advance(1)
            self.compliance.tick()

    def objective(self, index: int = 0) -> dict[str, Any]:
        """What /slo says of one."""
        from jaxserve.telemetry.slo.report import report

        self.compliance.tick()
        return report(self.compliance)["objectives"][index]


def ended(begun: Begun, done_ns: int, **values) -> RequestRecord:
    """The record of a request; its first token came after half of its time, if at all."""
    half_ns = (begun.arrived_ns + done_ns) // 2
    fields: dict[str, Any] = {
        "model": begun.model,
        "tenant": begun.tenant,
        "priority": begun.priority,
        "adapter": begun.adapter,
        "read_ns": begun.arrived_ns,
        "done_ns": done_ns,
        "outcome": Outcome.DONE,
        "completion_tokens": 11,
    } | values
    if fields["outcome"] in (Outcome.DONE, Outcome.LEFT) and "first_token_ns" not in fields:
        fields["first_token_ns"] = half_ns
    if fields.get("first_token_ns") and "decode_tokens" not in fields:
        fields |= {"decode_tokens": 10, "decode_ns": done_ns - half_ns}
    return RequestRecord(
        request_id=begun.request_id, route=begun.route, arrived_ns=begun.arrived_ns, **fields
    )


def asked(max_tokens: int) -> Asked:
    return Asked(max_tokens=max_tokens)

"""What is charged, wasted and idle is what the machine and its energy cost: in a real server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from prometheus_client.core import CollectorRegistry
from prometheus_client.exposition import generate_latest

from jaxserve.config import Config, MeteringConfig
from jaxserve.errors import ConfigError
from jaxserve.http.observer import metering as metering_module
from jaxserve.http.observer.ledger import LedgerPart, open_ledger
from jaxserve.http.observer.metering import TOTALS_S, Metering
from jaxserve.http.observer.parts import check_parts
from jaxserve.metering.budgets import Budget
from jaxserve.metering.entry import Entry, Line, LineKind
from jaxserve.metering.prices import make_prices
from jaxserve.metering.pricing import Rate
from jaxserve.protocol.messages import SequenceRecord
from jaxserve.protocol.records import RequestCost, RequestRecord
from jaxserve.protocol.status import StepStats
from tests.fakes.cost_observer import FILE
from tests.http.storm import client_of, metric, ready, until
from tests.http.test_serve import address_of, children, command, started

S = 10**9
NOVEMBER_S = 1_795_651_200.0  # 2026-11-26
CONFIG = MeteringConfig(
    currency="EUR",
    hardware_per_hour=10,
    energy_per_kwh=0.3,
    pue=1.4,
    power="modelled",
    idle_watts=100,
    busy_watts=500,
)


class Book:
    """A ledger in memory, which may fail."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.lines: dict[tuple[str, int], Line] = {}
        self.totals: Mapping[str, Decimal] = {}
        self.fails = False

    def add(self, entries: Sequence[Entry], lines: Sequence[Line]) -> None:
        if self.fails:
            raise OSError("the database is gone")
        self.entries |= {e.request_id: e for e in entries if e.request_id not in self.entries}
        self.lines |= {(line.source, line.number): line for line in lines}

    def month_totals(self, month: str) -> Mapping[str, Decimal]:
        if self.fails:
            raise OSError("the database is gone")
        return self.totals

    def cost(self, *kinds: LineKind) -> Decimal:
        return sum((x.cost for x in self.lines.values() if x.kind in kinds), Decimal(0))


class Clock:
    """Time as a test has it."""

    def __init__(self) -> None:
        self.ns = 0
        self.wall_offset_s = NOVEMBER_S

    def __call__(self) -> int:
        return self.ns

    def wall_s(self) -> float:
        return self.wall_offset_s + self.ns / S


class Watched:
    """The part, with a clock and a ledger of the test's."""

    def __init__(self, path: Path, config: MeteringConfig = CONFIG, **values) -> None:
        self.clock, self.book = Clock(), values.pop("book", Book())
        self.told: dict[str, bytes] = {}
        self.metering = Metering(
            config, self.book, self.told.__setitem__, path, source=values.pop("source", "a"),
            clock_ns=self.clock, wall_s=self.clock.wall_s, **values,
        )  # fmt: skip
        self.num_ended = 0

    def pass_time(self, seconds: float) -> None:
        """Ticks and flushes once."""
        self.clock.ns += int(seconds * S)
        asyncio.run(self._turn())

    async def _turn(self) -> None:
        await self.metering.tick()
        await self.metering.flush()

    def step(self, device_ns: int) -> None:
        self.metering.step(step_stats(self.clock.ns, device_ns))

    def ended(self, *sequences: SequenceRecord, **values) -> RequestRecord:
        self.num_ended += 1
        record = RequestRecord(
            **{"request_id": f"r{self.num_ended}", "route": "/v1/completions", "arrived_ns": 1}
            | {"done_ns": self.clock.ns} | values,
            sequences=list(sequences),
        )  # fmt: skip
        self.metering.ended(record)
        return record

    def close(self) -> None:
        asyncio.run(self.metering.close())


def step_stats(at_ns: int, device_ns: int) -> StepStats:
    given = {"program": "x", "device_ns": device_ns, "at_ns": at_ns}
    missing = [field.name for field in dataclasses.fields(StepStats) if field.name not in given]
    return StepStats(**given | dict.fromkeys(missing, 0))


def test_an_hour_of_requests_waste_and_idle_is_hardware_and_energy(tmp_path: Path):
    """Independently added up, against the price of the hour: half a percent is allowed."""
    watched = Watched(tmp_path)
    charged = wasted = Decimal(0)
    unowned_ns = 0
    for number in range(360):
        busy_ns = (number % 10) * S
        parts = [busy_ns * share // 100 for share in (20, 60, 5)]
        prefill, decode, waste = parts
        unowned_ns += busy_ns - sum(parts)
        watched.step(busy_ns)
        if busy_ns:
            watched.ended(
                SequenceRecord(
                    prefill_device_ns=prefill, decode_device_ns=decode, wasted_device_ns=waste
                )
            )
        watched.pass_time(10)
    watched.close()
    book = watched.book
    charged = sum((entry.cost for entry in book.entries.values()), Decimal(0))
    wasted = sum((entry.wasted_cost for entry in book.entries.values()), Decimal(0))
    rate = Rate(prices=make_prices(CONFIG), watts=500)
    whole = book.cost(LineKind.HARDWARE, LineKind.ENERGY)
    length_s = sum(x.duration_ns for x in book.lines.values() if x.kind is LineKind.HARDWARE) / S
    assert length_s == pytest.approx(3590, abs=11)
    found = charged + wasted + rate.cost(unowned_ns) + book.cost(LineKind.IDLE)
    assert abs(found - whole) / whole < Decimal("0.005")
    assert book.cost(LineKind.BUSY) + book.cost(LineKind.IDLE) == whole
    energy_kwh = (100 * 3600 + 400 * 0.45 * 3600) / 3.6e6
    assert float(whole) == pytest.approx(10 + energy_kwh * 0.3 * 1.4, rel=0.005)
    print(f"off by {float((found - whole) / whole):.2e} of the hour")


def test_what_was_priced_in_the_answer_is_what_is_kept(tmp_path: Path):
    watched = Watched(tmp_path)
    cost = RequestCost(
        currency="EUR", prefill=Decimal("0.5"), decode=Decimal("0.25"), wasted=Decimal(0),
        prefill_device_ns=1, decode_device_ns=2, wasted_device_ns=0, energy_j=3.0, carbon_g=0.0,
    )  # fmt: skip
    watched.ended(SequenceRecord(prefill_device_ns=S), cost=cost)
    watched.pass_time(1)
    (entry,) = watched.book.entries.values()
    assert entry.cost == Decimal("0.75") and entry.energy_j == 3.0


def test_a_request_that_comes_twice_is_one_entry(tmp_path: Path):
    watched = Watched(tmp_path)
    for _ in range(2):
        watched.ended(SequenceRecord(decode_device_ns=S), request_id="same")
    watched.pass_time(1)
    assert len(watched.book.entries) == 1


def test_while_the_ledger_is_gone_all_waits_and_then_is_kept(tmp_path: Path):
    watched = Watched(tmp_path)
    watched.book.fails = True
    for _ in range(60):
        watched.step(S // 2)
        watched.ended(SequenceRecord(decode_device_ns=S // 2))
        with pytest.raises(OSError):
            watched.pass_time(1)
    assert not watched.book.entries
    watched.book.fails = False
    watched.pass_time(1)
    assert len(watched.book.entries) == 60
    watched.close()
    book = watched.book
    assert sum(x.duration_ns for x in book.lines.values() if x.kind is LineKind.BUSY) == 30 * S
    whole = book.cost(LineKind.HARDWARE, LineKind.ENERGY)
    assert book.cost(LineKind.BUSY, LineKind.IDLE) == whole > 0


def test_a_long_outage_costs_no_more_each_second_and_loses_nothing(tmp_path: Path):
    """Of eight hours, in which the observer is killed, too."""
    book = Book()
    watched = Watched(tmp_path, book=book)
    book.fails = True
    sizes = []

    def hours(number: int) -> None:
        for _ in range(number * 360):
            watched.step(S)
            with contextlib.suppress(OSError):  # there is nothing to give at first
                watched.pass_time(10)
            sizes.append((tmp_path / "meter.json").stat().st_size)

    hours(4)
    killed, watched = watched, Watched(tmp_path, book=book)
    watched.clock.ns = killed.clock.ns
    hours(4)
    assert max(sizes) - sizes[2] < 8 * 250  # some numbers for each hour, no lines
    book.fails = False
    watched.pass_time(10)
    watched.pass_time(10)  # what came after the first lines
    watched.close()
    assert len(book.lines) == len({(line.source, line.number) for line in book.lines.values()})
    assert len(book.lines) < 2 * 4 * 10
    of_hours = {line.hour for line in book.lines.values()}
    assert len(of_hours) == 9  # and some seconds of the ninth
    whole_s = watched.clock.ns // S
    for kind, seconds in ((LineKind.HARDWARE, whole_s), (LineKind.BUSY, 8 * 360)):
        found = [line.duration_ns for line in book.lines.values() if line.kind is kind]
        assert sum(found) == seconds * S


def test_an_outage_gives_the_ledger_no_more_each_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Counting(Book):
        given: list[int]

        def add(self, entries: Sequence[Entry], lines: Sequence[Line]) -> None:
            self.given.append(len(entries))
            super().add(entries, lines)

    book = Counting()
    book.given, book.fails = [], True
    monkeypatch.setattr(metering_module, "GIVEN_AT_ONCE", 100)
    watched = Watched(tmp_path, book=book)
    for _ in range(10):
        for _ in range(95):
            watched.ended(SequenceRecord(decode_device_ns=S // 1000))
        with pytest.raises(OSError):
            watched.pass_time(1)
    assert book.given == [95] + [100] * 9
    book.given, book.fails = [], False
    watched.pass_time(1)
    assert book.given == [100] * 9 + [50]
    assert len(book.entries) == 950
    watched.pass_time(1)
    assert sum(book.given) == 950  # and nothing twice


def test_what_is_lost_while_the_ledger_takes_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Slow(Book):
        def add(self, entries: Sequence[Entry], lines: Sequence[Line]) -> None:
            for _ in range(3 if entries else 0):  # these come while it is written
                watched.ended(SequenceRecord())
            super().add(entries, lines)

    monkeypatch.setattr(metering_module, "MAX_UNKEPT", 10)
    book = Slow()
    watched = Watched(tmp_path, book=book)
    for _ in range(10):
        watched.ended(SequenceRecord())
    watched.pass_time(1)
    assert watched.metering._num_lost == 3  # given, and kept, all the same
    assert [entry.request_id for entry in watched.metering._unkept] == ["r11", "r12", "r13"]
    assert len(book.entries) == 10


def test_a_state_that_cannot_be_written_keeps_the_workers_reports(tmp_path: Path):
    """Requests go to the ledger all the same, which may be on another disk."""
    watched = Watched(tmp_path / "gone")
    watched.ended(SequenceRecord(decode_device_ns=S))
    with pytest.raises(OSError):
        watched.pass_time(11)
    assert len(watched.book.entries) == 1 and not watched.book.lines
    (tmp_path / "gone").mkdir()
    watched.pass_time(11)
    assert len(watched.book.entries) == 1 and watched.book.lines


def test_a_full_disk_is_a_ledger_that_is_not_up(tmp_path: Path):
    ledger = open_ledger(CONFIG, tmp_path, "eur")
    watched = Watched(tmp_path, book=ledger)
    part = LedgerPart(ledger, is_fed=lambda: watched.metering.keeps)

    def is_up() -> float:
        (family,) = [x for x in part.metrics() if x.name == "jaxserve_ledger_up"]
        return family.samples[0].value

    watched.pass_time(1)
    assert is_up() == 1
    (tmp_path / "meter.new").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        watched.pass_time(1)
    assert is_up() == 0
    (tmp_path / "meter.new").unlink()
    watched.pass_time(1)
    assert is_up() == 1
    watched.close()
    ledger.close()


def test_clock_steps_lose_and_double_nothing(tmp_path: Path):
    watched = Watched(tmp_path)
    for second in range(60):
        watched.step(S // 4)
        watched.clock.wall_offset_s = NOVEMBER_S + (-5000 if second == 20 else 9000 * (second > 40))
        watched.pass_time(1)
    watched.close()
    book = watched.book
    assert sum(x.duration_ns for x in book.lines.values() if x.kind is LineKind.BUSY) == 15 * S
    whole = book.cost(LineKind.HARDWARE, LineKind.ENERGY)
    assert book.cost(LineKind.BUSY, LineKind.IDLE) == whole


def spent(watched: Watched) -> dict[str, str]:
    return json.loads(watched.told["budgets"])["spent"]


def test_budgets_go_on_from_the_ledger_and_who_passes_is_told(tmp_path: Path):
    passed: list[tuple] = []
    book = Book()
    book.totals = {"acme": Decimal("9.5"), "other": Decimal(1)}
    budgets = {"acme": Budget(soft=Decimal(10), hard=Decimal("10.01"))}
    watched = Watched(
        tmp_path, book=book, budgets=budgets, on_passed=lambda *event: passed.append(event)
    )
    watched.pass_time(1)
    assert spent(watched) == {"acme": "9.500000"} and not passed
    watched.ended(SequenceRecord(decode_device_ns=185 * S), tenant="acme")  # 0.51, energy too
    watched.pass_time(1)
    assert [event[:3] for event in passed] == [("acme", "soft", True), ("acme", "hard", True)]
    assert Decimal(spent(watched)["acme"]) > 10
    book.totals = {"acme": Decimal("12")}  # another server has spent as well
    watched.pass_time(TOTALS_S)
    assert spent(watched) == {"acme": "12.000000"}
    watched.clock.wall_offset_s += 6 * 86400  # December
    book.totals = {}
    watched.pass_time(1)
    assert spent(watched) == {"acme": "0.000000"}
    assert {event[:3] for event in passed[2:]} == {("acme", "soft", False), ("acme", "hard", False)}
    assert json.loads(watched.told["budgets"])["month"] == "2026-12"


def test_a_ledger_that_tells_no_totals_leaves_what_was_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    budgets = {"acme": Budget(hard=Decimal(1))}
    watched = Watched(tmp_path, budgets=budgets)
    watched.pass_time(1)
    watched.book.fails = True
    watched.ended(SequenceRecord(decode_device_ns=36 * S), tenant="acme")
    with pytest.raises(OSError):
        watched.pass_time(TOTALS_S)
    assert Decimal(spent(watched)["acme"]) == pytest.approx(Decimal("0.10210"), rel=Decimal("0.01"))
    assert "month's totals" in caplog.text


def test_metrics_say_what_it_costs_now(tmp_path: Path):
    watched = Watched(tmp_path, budgets={"acme": Budget(soft=Decimal(5), hard=Decimal(7))})

    class Collector:
        def collect(self):
            return watched.metering.metrics()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())

    def metrics() -> dict[str, float]:
        lines = generate_latest(registry).decode().splitlines()
        return {k: float(v) for k, v in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}

    assert not any("per_million" in name for name in metrics())  # no traffic: no NaN
    watched.pass_time(1)
    watched.step(S)
    watched.ended(
        SequenceRecord(prefill_device_ns=S // 4, decode_device_ns=S // 2),
        prompt_tokens=1000, completion_tokens=10,
    )  # fmt: skip
    watched.pass_time(1)
    watched.pass_time(15)
    found = metrics()
    a_second = 10 / 3600 + 500 * 0.3 * 1.4 / 3.6e6
    each = 'jaxserve_cost_per_million_tokens{currency="EUR",kind="%s"}'
    assert found[each % "input"] == pytest.approx(a_second / 4 / 1000 * 1e6)
    assert found[each % "output"] == pytest.approx(a_second / 2 / 10 * 1e6)
    assert found['jaxserve_cost_total{currency="EUR",kind="decode"}'] == pytest.approx(a_second / 2)
    assert found['jaxserve_cost_total{currency="EUR",kind="busy"}'] >= a_second * 0.99
    assert found['jaxserve_cost_budget{kind="hard",tenant="acme"}'] == 7
    assert found['jaxserve_cost_power_watts{source="modelled"}'] == 100  # idle of late
    assert found["jaxserve_cost_power_modelled_seconds_total"] > 0
    assert found["jaxserve_cost_entries_total"] == 1


def test_settings_are_looked_at_before_anything_starts():
    check_parts(Config(metering=CONFIG))
    with pytest.raises(ConfigError, match=r"metering\.device"):
        check_parts(Config(metering=MeteringConfig(device="abacus")))


# ---------------------------------------------------------------------------- a real server


def child(server_pid: int, name: str) -> int | None:
    """The process of a server that runs this module, if there is one now."""
    for pid in children(server_pid):
        try:
            if name in command(pid):
                return pid
        except OSError:  # it ended just now
            pass
    return None


async def kill(server_pid: int, name: str) -> None:
    """SIGKILLs it, and waits for the next one."""
    pid = child(server_pid, name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: child(server_pid, name) not in (None, pid))


@pytest.mark.slow
def test_a_server_with_deaths_cancels_and_failures_adds_up(tmp_path: Path):
    """A SIGKILLed engine, a SIGKILLed observer, clients that leave, deadlines, preemption."""
    settings = (
        "engine=tests.fakes.paced_engine",
        "observer=tests.fakes.cost_observer",
        "http.workers=2",
        f"telemetry.state_dir={tmp_path}",
        "telemetry.flush_interval_s=0.1",
        "engine.restart_backoff_s=0.05",
        "model.max_context=300",
        "cache.page_size=4",
        "cache.num_pages=40",
        "scheduler.max_rows=8",
        "metering.hardware_per_hour=10",
        "metering.energy_per_kwh=0.3",
        "metering.power=modelled",
        "metering.idle_watts=100",
        "metering.busy_watts=500",
    )
    told: list[Decimal] = []
    ready_s: list[float] = []

    async def one(client: httpx.AsyncClient, index: int) -> None:
        body = {"prompt": [3 + index, 4, 5, 6], "seed": index, "max_tokens": 10 + index}
        body |= {"ignore_eos": True, "include_cost": True}
        if index % 4 == 0:
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as s:
                async for _ in s.aiter_lines():
                    break  # and leaves
        elif index % 4 == 1:
            await client.post("/v1/completions", json=body | {"timeout": 0.2})
        else:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            told.append(Decimal(answer.headers["x-request-cost"].split()[0]))

    async def storm(base: str, pid: int) -> None:
        async with client_of(base) as client:
            await ready(client)
            ready_s.append(time.monotonic())
            await asyncio.gather(*(one(client, index) for index in range(8)))
            work = asyncio.gather(*(one(client, index) for index in range(8, 32)))
            await until(lambda: len(told) > 4)
            await kill(pid, "cost_observer")
            await kill(pid, "paced_engine")
            await work
            await asyncio.gather(*(one(client, index) for index in range(32, 40)))

    began = time.monotonic()
    with started(*settings) as process:
        base = address_of(process)
        asyncio.run(asyncio.wait_for(storm(base, process.pid), 120))
        assert metric(base, "jaxserve_preemptions_total") > 0
        served_s = time.monotonic() - ready_s[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        log = process.stderr.read()
    wall_s = time.monotonic() - began
    documents = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    check_books(documents, told, served_s, wall_s)
    assert log.count("the observer has ended") == 1


def check_books(documents: list[dict], told: list[Decimal], served_s: float, wall_s: float) -> None:
    entries = [d for d in documents if "request_id" in d]
    lines = [d for d in documents if "kind" in d]
    steps = [d for d in documents if "step_ns" in d]
    assert len(entries) == 40
    cost = {kind: Decimal(0) for kind in LineKind}
    length = dict.fromkeys(LineKind, 0)
    for line in lines:
        cost[LineKind(line["kind"])] += Decimal(line["cost"])
        length[LineKind(line["kind"])] += line["duration_ns"]
    whole = cost[LineKind.HARDWARE] + cost[LineKind.ENERGY]
    assert cost[LineKind.BUSY] + cost[LineKind.IDLE] == whole > 0
    assert 0.5 * served_s < length[LineKind.HARDWARE] / S <= wall_s  # starting takes its time
    stepped_ns = sum(step["device_ns"] for step in steps)
    assert length[LineKind.BUSY] == stepped_ns > 0
    shares = ("prefill_device_ns", "decode_device_ns", "wasted_device_ns")
    owned_ns = sum(entry[share] for entry in entries for share in shares)
    assert 0.3 * stepped_ns < owned_ns <= stepped_ns
    charged = sum(Decimal(e["prefill_cost"]) + Decimal(e["decode_cost"]) for e in entries)
    wasted = sum(Decimal(entry["wasted_cost"]) for entry in entries)
    rate = Rate(prices=make_prices(CONFIG_OF_SERVER), watts=500)
    nobodys = rate.cost(stepped_ns - owned_ns)
    found = charged + wasted + nobodys + cost[LineKind.IDLE]
    print(f"\ncharged {charged:.6f}, waste {wasted + nobodys:.6f}, idle {cost[LineKind.IDLE]:.6f}")
    print(f"of {whole:.6f}: off by {(found - whole) / whole:.2e}")
    assert abs(found - whole) / whole < Decimal("0.005")
    kept = {Decimal(e["prefill_cost"]) + Decimal(e["decode_cost"]) for e in entries}
    assert told and set(told) <= kept  # the client was told what the ledger has
    left = [entry for entry in entries if entry["outcome"] == "left"]
    assert len(left) == 10 and any(entry["decode_device_ns"] for entry in left)  # cut: not free


CONFIG_OF_SERVER = MeteringConfig(hardware_per_hour=10, energy_per_kwh=0.3)

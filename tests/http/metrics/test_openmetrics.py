"""OpenMetrics says what the text format says, by the client library's own parser of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from jaxserve.config import Config, TelemetryConfig
from jaxserve.engine.thread import EngineThread
from jaxserve.http.metrics import END, Metrics, wants_open
from jaxserve.http.metrics.exemplars import Exemplars
from jaxserve.http.observer.messages import Answer, Question
from jaxserve.http.observer.observer import METRICS, OPEN_METRICS, Observer
from jaxserve.http.observer.parts import make_parts
from jaxserve.http.observer.reporter import NoReporter
from tests.fakes.clock import Clock
from tests.fakes.engine import fake_parts
from tests.http.frontend import CONFIG, Front
from tests.http.metrics.exposed import Exposed
from tests.http.metrics.test_counting import record, status, step_stats

#: What Prometheus 2.42 sends, and 3.
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(page: bytes) -> Samples:
    """Of an OpenMetrics page, which the parser refuses where it is none."""
    found: Samples = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; version=1.0.0", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.2, text/plain;q=0.9", False),
        ("application/openmetrics-text;q=much", False),
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
    ],
)
def test_who_wants_it(accept: str, wanted: bool):
    assert wants_open(accept) is wanted


def test_both_formats_say_the_same():
    metrics = Metrics(lambda: status(shed={"queue_full": 7}), config=TelemetryConfig())
    metrics.step(step_stats(prefix_lookup_tokens=100, program="decode_r8", device_ns=5_000_000))
    for number in range(3):
        metrics.ended(record(tenant=f't"{number}\n', done_ns=(2 + number) * 10**9))
    plain = Exposed(metrics.render()).samples
    open_page = metrics.render(is_open=True) + END
    found = samples(open_page)
    rates = {key for key in found if key[0].endswith("_seconds") and "age" in key[0]}
    assert {k: v for k, v in found.items() if k not in rates} == {
        k: v for k, v in plain.items() if k not in rates
    }
    assert len(found) > 300
    assert b"# {" not in open_page  # nothing is traced


def test_buckets_of_latencies_name_a_traced_request():
    metrics = Metrics(status)
    for number, (seconds, sampled) in enumerate(((2.0, True), (2.1, True), (2.2, False))):
        ended_ns = 10**9 + round(seconds * 1e9)
        metrics.ended(record(trace_id=f"{number:032x}", sampled=sampled, done_ns=ended_ns))
    found = {
        (sample.name, sample.labels["le"]): sample.exemplar
        for family in text_string_to_metric_families((metrics.render(is_open=True) + END).decode())
        for sample in family.samples
        if sample.exemplar
    }
    name = "gen_ai_server_request_duration_seconds_bucket"
    assert {le for each, le in found if each == name} == {"2.56"}
    exemplar = found[name, "2.56"]
    assert (exemplar.labels, exemplar.value) == ({"trace_id": f"{1:032x}"}, 2.1)
    assert float(exemplar.timestamp) > 1.7e9
    assert {each for each, _ in found} == {
        name,
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "gen_ai_server_time_per_output_token_seconds_bucket",
    }
    assert b"trace_id" not in metrics.render()


def test_a_shown_bucket_names_the_newest_of_its_counted_ones():
    wall = Clock(1000.0)
    exemplars = Exemplars(wall)
    assert exemplars.shown(7, (2, 4)) == []
    for bucket in (1, 2, 0, 9):
        exemplars.keep(7, bucket, f"t{bucket}", float(bucket))
        wall.advance(1)
    first, second, rest = exemplars.shown(7, (2, 4))
    assert first is not None and (first.trace_id, first.at_s) == ("t0", 1002.0)
    assert second is None
    assert rest is not None and rest.trace_id == "t9"
    assert exemplars.shown(8, (2, 4)) == []


def test_the_observer_tells_the_same_in_both(tmp_path: Path):
    async def pages() -> list[bytes]:
        parts = make_parts(Config(), tmp_path, lambda *_: None, lambda *_: None)
        observer = Observer(tmp_path / "o", parts, 1.0)
        asked = [
            (await observer._ask(Question(id=0, name=name))).body
            for name in (METRICS, OPEN_METRICS)
        ]
        await observer.close()
        return asked

    plain, open_page = asyncio.run(pages())
    assert samples(open_page + END) == Exposed(plain).samples
    assert END not in open_page


def test_it_is_served_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    class Observing(NoReporter):
        async def ask(self, question: Question) -> Answer:
            return Answer(body=f"# TYPE from_{question.name} gauge\n".encode())

    with EngineThread(CONFIG, fake_parts) as engine:
        front = Front(engine)
        try:
            monkeypatch.setattr(front.app.frontend, "reporter", Observing())
            asked = front.get("/metrics", headers={"accept": PROMETHEUS_2})
            plain = front.get("/metrics")
        finally:
            front.close()
    assert asked.headers["content-type"] == (
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    )
    assert asked.content.endswith(b"# TYPE from_openmetrics gauge\n# EOF\n")
    assert samples(asked.content)["jaxserve_engine_ready", frozenset()] == 1
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert plain.content.endswith(b"# TYPE from_metrics gauge\n")

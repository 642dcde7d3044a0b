"""The console's files and documents, without a browser."""

from __future__ import annotations

import asyncio
import hashlib

import msgspec
import pytest
import yaml

from jaxserve.config import HttpConfig, TelemetryConfig
from jaxserve.errors import InvalidRequest
from jaxserve.http.console import PATHS, POLICY, RequestNotFound
from jaxserve.http.keyfile import load_keys
from jaxserve.http.observer.console import console_part
from jaxserve.http.observer.messages import News, Question
from jaxserve.protocol.records import RequestRecord
from tests.http.frontend import Front
from tests.http.frontend import front as make_front

S = 1_000_000_000


def ask(part, name: str, **query: str):
    """The document of an answer."""
    question = Question(id=0, name=name, query=query, admin=True)
    return msgspec.json.decode(asyncio.run(part.asks[name](question)).body)


@pytest.fixture
def part():
    """The part at 1,000 s."""
    peaks = TelemetryConfig(device_flops_per_s=1e12, device_bytes_per_s=2e11)
    return console_part(config=peaks, clock_ns=lambda: 1000 * S, wall_s=lambda: 1.7e9)


def test_the_page_is_all_its_own(front: Front):
    response = front.get("/console")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"].encode() == POLICY
    assert b"unsafe" not in POLICY and b"http" not in POLICY
    assert len(PATHS) >= 12
    for path in PATHS:
        text = front.get(path).text
        for foreign in ("https:", "//cdn", "<script>", "innerHTML", "eval(", "document.write"):
            assert foreign not in text, (path, foreign)
        if not path.endswith(".svg"):
            assert "http:" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "style=" not in front.get("/console").text
    assert front.get("/console/main.js").headers["content-type"] == "text/javascript; charset=utf-8"


def test_a_file_that_the_browser_has_is_not_sent_again(front: Front):
    first = front.get("/console/console.css")
    tag = first.headers["etag"]
    again = front.get("/console/console.css", headers={"If-None-Match": f"W/{tag}"})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == tag
    other = front.get("/console/console.css", headers={"If-None-Match": '"other"'})
    assert other.content == first.content
    head = front.run(front.http.head("/console"))
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    "path", ["/console/", "/console/nothing.js", "/console/__init__.py", "/console/..%2fapp.py"]
)
def test_what_is_no_file_of_the_page_is_not_there(front: Front, path: str):
    assert front.get(path).status_code == 404


def test_nothing_is_observed_without_an_observer(front: Front):
    response = front.get("/console/data")
    assert response.status_code == 503
    assert "telemetry.enabled" in response.json()["error"]["message"]


def test_the_page_is_for_everyone_and_its_data_for_admins(tmp_path):
    rows = [
        {"hash": hashlib.sha256(role.encode()).hexdigest(), "tenant": "a", "role": role}
        for role in ("user", "admin")
    ]
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump({"keys": rows}))
    http = HttpConfig(key_file=str(path))
    with make_front(http, load_keys(http)) as front:
        for path in PATHS:
            assert front.get(path).status_code == 200
        for path in ("/console/data", "/console/request?id=1"):
            statuses = [
                front.get(path, headers={"Authorization": f"Bearer {key}"}).status_code
                for key in ("user", "admin")
            ]
            assert statuses == [403, 503]  # an admin reaches the observer, which is not there
            assert front.get(path).status_code == 401


def test_the_document_has_what_the_page_draws(part):
    part.news(News(kind="engine_down", at_ns=999 * S, subject="it died"))
    part.ended(
        RequestRecord(
            request_id="ab" * 16,
            route="/v1/completions",
            arrived_ns=999 * S,
            done_ns=999 * S + 5,
            tenant="<script>",
        )
    )
    told = ask(part, "console", step="60")
    assert told["peaks"] == {"flops": 1e12, "bytes": 2e11}
    assert told["news"] == [{"kind": "engine_down", "subject": "it died", "at_s": 1.7e9 - 1}]
    assert told["engine"] is None
    assert told["tenants"][0]["tenant"] == "<script>"
    assert told["series"]["step_s"] == 60
    assert [row["id"] for row in told["requests"]["rows"]] == ["ab" * 16]
    assert ask(part, "console", requests="1")["requests"]["rows"] == []
    assert ask(part, "request", id="ab" * 16)["total_ms"] == 5e-6


def test_a_request_that_is_not_known_is_404(part):
    with pytest.raises(RequestNotFound, match="x-request-id") as raised:
        ask(part, "request", id="nobody")
    assert raised.value.status == 404


@pytest.mark.parametrize(
    "query",
    [{"step": "2"}, {"since": "x"}, {"since": "-2"}, {"requests": "9" * 20}, {"since": "²"}],
)
def test_a_wrong_question_is_refused_by_name(part, query):
    with pytest.raises(InvalidRequest) as raised:
        ask(part, "console", **query)
    assert raised.value.param in query

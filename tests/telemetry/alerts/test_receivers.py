"""What each kind of receiver gets, and what it makes of errors; no secret is ever seen."""

from __future__ import annotations

import hashlib
import hmac
import logging
import socket

import httpx2
import pytest

from jaxserve.config import AlertsConfig
from jaxserve.errors import ConfigError
from jaxserve.settings import describe, load_config
from jaxserve.telemetry.alerts.courier import DeliveryError, Receiver
from jaxserve.telemetry.alerts.incident import Change, Incident, Notice, Severity
from jaxserve.telemetry.alerts.receivers import make_receivers
from tests.fakes.alert_receiver import AlertReceiver

SECRET = "Zq8sEcReTv3rY"


def notice(change: Change = Change.FIRING, **values) -> Notice:
    incident = Incident(
        **{
            "key": "slo:ttft",
            "severity": Severity.CRITICAL,
            "title": "TTFT <p99> & more",
            "details": {"p99": "120 ms"},
            "started_s": 1_700_000_000.0,
        }
        | values
    )
    return Notice(id="abc", change=change, incident=incident)


def one(kind: str, at: AlertReceiver, **settings) -> Receiver:
    """The only receiver of a configuration."""
    entry = {
        "pagerduty": {"pagerduty": (SECRET,), "pagerduty_url": f"https://127.0.0.1:{at.port}"},
        "slack": {"slack": (f"{at.url}/services/{SECRET}",)},
        "webhooks": {"webhooks": (f"{at.url}/hook?token={SECRET}",)},
        "alertmanagers": {"alertmanagers": (f"http://user:{SECRET}@127.0.0.1:{at.port}",)},
    }[kind]
    (receiver,) = make_receivers(AlertsConfig(**entry | settings), "host:8000")
    receiver.transport = Plain
    return receiver


class Plain(httpx2.HTTPTransport):
    """Sends without TLS what is to go to https://127.0.0.1."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.url = request.url.copy_with(scheme="http")
        return super().handle_request(request)


KINDS = ["pagerduty", "slack", "webhooks", "alertmanagers"]


def test_pagerduty_gets_its_events():
    with AlertReceiver() as at:
        receiver = one("pagerduty", at)
        receiver.send(notice())
        receiver.send(notice(Change.RESOLVED, ended_s=1_700_000_100.0))
        trigger, resolve = at.bodies
    assert at.paths == ["/v2/enqueue", "/v2/enqueue"]
    assert trigger["routing_key"] == resolve["routing_key"] == SECRET
    assert trigger["event_action"] == "trigger"
    assert trigger["dedup_key"] == resolve["dedup_key"] == "jaxserve/host:8000/slo:ttft"
    assert resolve["event_action"] == "resolve"
    assert trigger["payload"] == {
        "summary": "TTFT <p99> & more",
        "source": "host:8000",
        "severity": "critical",
        "timestamp": "2023-11-14T22:13:20.000+00:00",
        "component": "jaxserve",
        "custom_details": {"p99": "120 ms"},
    }


def test_slack_gets_a_message():
    with AlertReceiver() as at:
        receiver = one("slack", at)
        receiver.send(notice())
        receiver.send(notice(Change.RESOLVED, ended_s=1_700_000_100.0))
        first, second = at.bodies
    assert at.paths[0] == f"/services/{SECRET}"
    shown = first["blocks"][0]["text"]["text"]
    assert "TTFT &lt;p99&gt; &amp; more" in shown and "*p99* 120 ms" in shown
    assert first["text"].startswith("firing: ")
    assert "over after 100 s" in second["blocks"][1]["elements"][0]["text"]


def test_a_webhook_gets_signed_json():
    with AlertReceiver() as at:
        one("webhooks", at, webhook_secret=SECRET).send(notice())
        one("webhooks", at).send(notice(Change.RESOLVED, ended_s=1_700_000_100.0))
        (first, second), raw, headers = at.bodies, at.raw, at.headers
    assert first == {
        "id": "abc",
        "status": "firing",
        "reminder": False,
        "key": "jaxserve/host:8000/slo:ttft",
        "source": "host:8000",
        "severity": "critical",
        "title": "TTFT <p99> & more",
        "details": {"p99": "120 ms"},
        "started_at": "2023-11-14T22:13:20.000+00:00",
        "ended_at": None,
    }
    assert second["status"] == "resolved"
    signature = hmac.new(SECRET.encode(), raw[0], hashlib.sha256).hexdigest()
    assert headers[0]["x-jaxserve-signature"] == f"sha256={signature}"
    assert "x-jaxserve-signature" not in headers[1]


def test_alertmanager_gets_alerts_with_basic_authentication():
    with AlertReceiver() as at:
        one("alertmanagers", at).send(notice())
        ((alert,),) = at.bodies
    assert at.paths == ["/api/v2/alerts"]
    assert at.headers[0]["authorization"].startswith("Basic ")
    assert alert["labels"] == {
        "alertname": "jaxserve slo",
        "key": "jaxserve/host:8000/slo:ttft",
        "instance": "host:8000",
        "severity": "critical",
    }
    assert alert["annotations"] == {"summary": "TTFT <p99> & more", "description": "p99: 120 ms"}


@pytest.mark.parametrize(
    ("kind", "status", "refused"),
    [
        (kind, status, refused)
        for kind in KINDS
        for status, refused in ((400, True), (404, True), (429, False), (500, False), (302, False))
    ],
)
def test_what_is_not_taken_is_an_error_that_shows_no_secret(
    kind: str, status: int, refused: bool, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    with AlertReceiver() as at:
        at.statuses = [status] * 3
        with pytest.raises(DeliveryError) as caught:
            one(kind, at).send(notice())
        assert at.num_refused == 1  # the library has not tried again by itself
        assert at.bodies == []
    assert str(status) in caught.value.reason
    assert caught.value.refused is refused
    assert caught.value.retry_after_s == (7 if status == 429 else 0)
    assert SECRET not in str(caught.value) + repr(caught.value) + caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_receiver_that_is_away_is_an_error_that_shows_no_secret(
    kind: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    with socket.socket() as unused, AlertReceiver() as at:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        at.stop()
        at.port = unused.getsockname()[1]
        with pytest.raises(DeliveryError, match="cannot be reached") as caught:
            one(kind, at).send(notice())
    assert not caught.value.refused
    assert SECRET not in str(caught.value) + repr(caught.value) + caplog.text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_identities_show_no_secret(kind: str):
    with AlertReceiver() as at:
        receiver, other = one(kind, at), one(kind, at)
    assert SECRET not in receiver.name + receiver.identity
    assert receiver.identity == other.identity
    assert receiver.name.endswith(" 1")


def test_each_entry_may_say_from_which_severity_on():
    config = AlertsConfig(
        slack=("critical:https://a.example/x", "https://b.example/y"),
        pagerduty=("error:KEY",),
    )
    first, second, third = make_receivers(config, "s")
    assert [r.least for r in (first, second, third)] == ["error", "critical", "warning"]
    assert [r.name for r in (first, second, third)] == ["pagerduty 1", "slack 1", "slack 2"]


@pytest.mark.parametrize(
    "settings",
    [
        {"slack": (f"ftp://{SECRET}",)},
        {"slack": (f"critical:{SECRET}",)},
        {"webhooks": (f"http://[{SECRET}",)},
        {"webhooks": ("https://good.example", f"https://a b/{SECRET}")},
        {"alertmanagers": (f"warning:http:///{SECRET}",)},
        {"pagerduty": (f"{SECRET}é",)},
        {"pagerduty": (SECRET,), "pagerduty_url": "events.pagerduty.com"},
        {"pagerduty": (SECRET,), "pagerduty_url": "http://events.pagerduty.com"},
    ],
)
def test_a_wrong_entry_is_named_by_its_place_only(settings):
    with pytest.raises(ConfigError, match=r"alerts\.") as caught:
        make_receivers(AlertsConfig(**settings), "s")
    assert SECRET not in caught.value.message


def test_the_printed_configuration_shows_no_secret():
    config = load_config(
        settings=[
            f"alerts.{name}={SECRET},{SECRET}"
            for name in ("pagerduty", "slack", "webhooks", "alertmanagers", "webhook_secret")
        ],
        environ={},
    )
    assert SECRET not in describe(config)
    assert describe(config).count("***") == 5

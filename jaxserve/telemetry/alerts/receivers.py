"""Those who are told: PagerDuty, Slack, any HTTP endpoint, Alertmanager.

Their addresses and keys are secrets: they are in no name, no log and no error, and the libraries'
own loggers stay silent. No library retries: `courier` does, for all alike. A library is imported
where somebody is told by it.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jaxserve.config import AlertsConfig
from jaxserve.errors import ConfigError
from jaxserve.telemetry.alerts.courier import DeliveryError, Receiver
from jaxserve.telemetry.alerts.incident import Change, Incident, Notice, Severity

if TYPE_CHECKING:
    from httpx2 import BaseTransport
    from slack_sdk.webhook import WebhookClient

TIMEOUT_S = 10.0
#: How often Alertmanager is told of what is open, and how long it believes it.
ALERTMANAGER_RESEND_S = 60.0
ALERTMANAGER_BELIEVES_S = 4 * ALERTMANAGER_RESEND_S
#: Statuses that do not mean that the request is wrong.
_RETRYABLE_4XX = (408, 425, 429)

_SILENT = logging.Logger("jaxserve alert receivers", logging.CRITICAL + 1)  # has no parent
_SILENT.disabled = True


def make_receivers(config: AlertsConfig, source: str) -> list[Receiver]:
    """Those that are configured.

    Args:
        source: what the server is called in alerts.

    Raises:
        ConfigError: an entry is wrong; it is named by its place, its value is not shown.
    """
    made: list[Receiver] = []
    for place, (least, key) in enumerate(_entries("pagerduty", config.pagerduty), 1):
        name = _Named("pagerduty", place, least, key)
        url = _url("pagerduty_url", 0, config.pagerduty_url)
        if not url.startswith("https://"):
            raise ConfigError(f"alerts.pagerduty_url must begin with https://, got {url!r}")
        made.append(PagerDuty(name, key, url, source))
    for place, (least, url) in enumerate(_entries("slack", config.slack), 1):
        made.append(Slack(_Named("slack", place, least, url), _url("slack", place, url), source))
    for place, (least, url) in enumerate(_entries("webhooks", config.webhooks), 1):
        name = _Named("webhook", place, least, url)
        made.append(Webhook(name, _url("webhooks", place, url), config.webhook_secret, source))
    for place, (least, url) in enumerate(_entries("alertmanagers", config.alertmanagers), 1):
        name = _Named("alertmanager", place, least, url)
        made.append(Alertmanager(name, _url("alertmanagers", place, url), source))
    return made


def dedup_key(source: str, key: str) -> str:
    """By which a receiver knows an incident of this server again."""
    return f"jaxserve/{source}/{key}"


@dataclass(frozen=True)
class _Named:
    """What all receivers have: a name without secrets, and whom they are told of."""

    kind: str
    place: int
    least: Severity
    secret: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.place}"

    @property
    def identity(self) -> str:
        """Of its queue: survives a change of order in the configuration, and shows nothing."""
        digest = hashlib.sha256(f"{self.kind}\n{self.secret}".encode()).hexdigest()
        return f"{self.kind}-{digest[:12]}"


class PagerDuty:
    """Events API v2, by its library, which only takes https.

    Attributes:
        transport: makes another than the library's own; tests have no certificates.
    """

    resend_s = 0.0
    transport: Callable[[], BaseTransport] | None = None

    def __init__(self, named: _Named, key: str, url: str, source: str) -> None:
        self.name, self.identity, self.least = named.name, named.identity, named.least
        self._key = key
        self._url = url
        self._source = source

    def send(self, notice: Notice) -> None:
        """See `Receiver`."""
        from pagerduty import Error, EventsApiV2Client

        incident = notice.incident
        key = dedup_key(self._source, incident.key)
        transport = self.transport() if self.transport is not None else None
        with EventsApiV2Client(self._key, base_url=self._url, transport=transport) as client:
            client.log = _SILENT
            client.timeout = TIMEOUT_S
            client.max_network_attempts = 0
            # So that a 429 comes back at once, instead of being waited for.
            client.retry, client.max_http_attempts = {429: 1}, -1
            try:
                if notice.change is Change.RESOLVED:
                    client.resolve(key)
                else:
                    client.trigger(
                        incident.title,
                        self._source,
                        dedup_key=key,
                        severity=incident.severity,
                        payload={"timestamp": _iso(incident.started_s), "component": "jaxserve"},
                        custom_details=dict(incident.details),
                    )
            except Error as error:
                response = getattr(error, "response", None)
                if response is None:
                    cause = type(error.__cause__ or error).__name__
                    raise DeliveryError(f"cannot be reached ({cause})") from None
                raise _answered(response.status_code, response.headers) from None


class Slack:
    """An incoming webhook, by slack-sdk."""

    resend_s = 0.0

    def __init__(self, named: _Named, url: str, source: str) -> None:
        self.name, self.identity, self.least = named.name, named.identity, named.least
        self._client = _slack_client(url)
        self._source = source

    def send(self, notice: Notice) -> None:
        """See `Receiver`."""
        incident = notice.incident
        mark = (
            ":white_check_mark:"
            if notice.change is Change.RESOLVED
            else _SLACK_MARKS[incident.severity]
        )
        head = f"{mark} *{_slack(incident.title)}*"
        fields = [f"*{_slack(name)}* {_slack(value)}" for name, value in incident.details.items()]
        foot = f"{_slack(self._source)}: {_state(notice)}, {incident.severity}"
        text = f"{notice.change}: {incident.title} ({self._source})"
        blocks: list[Any] = [_slack_block("\n".join([head, *fields])), _slack_context(foot)]
        try:
            answer = self._client.send(text=text, blocks=blocks)
        except (OSError, http.client.HTTPException) as error:
            raise DeliveryError(_unreachable(error)) from None
        if answer.status_code != 200:
            raise _answered(answer.status_code, answer.headers)


def _slack_client(url: str) -> WebhookClient:
    """slack-sdk's, but for redirects, which it would follow: the address is a secret."""
    from slack_sdk.webhook import WebhookClient, WebhookResponse

    class Client(WebhookClient):
        def _perform_http_request_internal(
            self, url: str, req: urllib.request.Request
        ) -> WebhookResponse:
            with _OPENER.open(req, timeout=TIMEOUT_S) as answer:
                body = answer.read().decode("utf-8", "replace")
                headers = dict(answer.headers.items())
            return WebhookResponse(url=url, status_code=answer.status, body=body, headers=headers)

    return Client(url, logger=_SILENT, retry_handlers=[])


class Webhook:
    """POSTs JSON; with a secret, signed as `x-jaxserve-signature: sha256=HMAC(body)`."""

    resend_s = 0.0

    def __init__(self, named: _Named, url: str, secret: str, source: str) -> None:
        self.name, self.identity, self.least = named.name, named.identity, named.least
        self._url = url
        self._secret = secret.encode()
        self._source = source

    def send(self, notice: Notice) -> None:
        """See `Receiver`."""
        incident = notice.incident
        body = {
            "id": notice.id,
            "status": "resolved" if notice.change is Change.RESOLVED else "firing",
            "reminder": notice.change is Change.REMINDER,
            "key": dedup_key(self._source, incident.key),
            "source": self._source,
            "severity": incident.severity,
            "title": incident.title,
            "details": incident.details,
            "started_at": _iso(incident.started_s),
            "ended_at": _iso(incident.ended_s) if incident.ended_s else None,
        }
        data = json.dumps(body).encode()
        headers = {}
        if self._secret:
            signature = hmac.new(self._secret, data, hashlib.sha256).hexdigest()
            headers["x-jaxserve-signature"] = f"sha256={signature}"
        _post(self._url, data, headers)


class Alertmanager:
    """/api/v2/alerts of Prometheus' Alertmanager, which forgets what it is not told again."""

    resend_s = ALERTMANAGER_RESEND_S

    def __init__(self, named: _Named, url: str, source: str) -> None:
        self.name, self.identity, self.least = named.name, named.identity, named.least
        self._url = url.rstrip("/") + "/api/v2/alerts"
        self._source = source

    def send(self, notice: Notice) -> None:
        """See `Receiver`."""
        incident = notice.incident
        now_s = datetime.now(UTC).timestamp()
        ends_s = incident.ended_s or now_s + ALERTMANAGER_BELIEVES_S
        alert = {
            "labels": {
                "alertname": f"jaxserve {incident.key.partition(':')[0]}",
                "key": dedup_key(self._source, incident.key),
                "instance": self._source,
                "severity": incident.severity,
            },
            "annotations": {"summary": incident.title, **_annotations(incident)},
            "startsAt": _iso(incident.started_s),
            "endsAt": _iso(max(ends_s, incident.started_s + 0.001)),
        }
        _post(self._url, json.dumps([alert]).encode(), {})


_SLACK_MARKS = {
    Severity.INFO: ":information_source:",
    Severity.WARNING: ":warning:",
    Severity.ERROR: ":red_circle:",
    Severity.CRITICAL: ":rotating_light:",
}


def _post(url: str, data: bytes, headers: Mapping[str, str]) -> None:
    parts = urlsplit(url)
    sent = {"content-type": "application/json", "user-agent": "jaxserve", **headers}
    if parts.username is not None:
        pair = f"{parts.username}:{parts.password or ''}"
        sent["authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        host = parts.netloc.rpartition("@")[2]
        url = parts._replace(netloc=host).geturl()
    request = urllib.request.Request(url, data=data, headers=sent, method="POST")
    try:
        with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
            status, answered = answer.status, answer.headers
    except urllib.error.HTTPError as error:
        with error:
            status, answered = error.code, error.headers
    except (OSError, http.client.HTTPException) as error:
        raise DeliveryError(_unreachable(error)) from None
    if not 200 <= status < 300:
        raise _answered(status, dict(answered.items()))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An alert goes where it was said, and nowhere else."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None: the redirect is an answer like any other."""
        return


_OPENER = urllib.request.build_opener(_NoRedirect)


def _answered(status: int, headers: Any) -> DeliveryError:
    """An answer other than yes."""
    refused = 400 <= status < 500 and status not in _RETRYABLE_4XX
    after = {str(k).lower(): v for k, v in dict(headers).items()}.get("retry-after", "")
    retry_after_s = float(after) if str(after).isdecimal() else 0.0
    return DeliveryError(
        f"it answered with status {status}", refused=refused, retry_after_s=min(retry_after_s, 3600)
    )


def _unreachable(error: Exception) -> str:
    """Without the error's text, which may hold the address."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return f"cannot be reached ({type(cause).__name__})"


def _entries(name: str, entries: tuple[str, ...]) -> list[tuple[Severity, str]]:
    """Each as its least severity and the rest: "critical:https://…", or without the first."""
    out = []
    for place, entry in enumerate(entries, 1):
        word, colon, rest = entry.partition(":")
        if colon and word in list(Severity):
            least, value = Severity(word), rest
        else:
            least, value = Severity.WARNING, entry
        if not value or any(c.isspace() or not c.isascii() for c in value):
            raise ConfigError(
                f"entry {place} of alerts.{name} is empty, or not ASCII without spaces"
            )
        out.append((least, value))
    return out


def _url(name: str, place: int, url: str) -> str:
    where = f"entry {place} of alerts.{name}" if place else f"alerts.{name}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"{where} must be an http:// or https:// address (its value is a secret)")
    return url


def _annotations(incident: Incident) -> dict[str, str]:
    lines = [f"{name}: {value}" for name, value in incident.details.items()]
    return {"description": "\n".join(lines)} if lines else {}


def _state(notice: Notice) -> str:
    incident = notice.incident
    if notice.change is Change.RESOLVED:
        return f"over after {max(0.0, incident.ended_s - incident.started_s):.0f} s"
    return f"since {_iso(incident.started_s)}"


def _iso(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")


def _slack(text: str) -> str:
    """Slack's three special characters, escaped."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _slack_block(text: str) -> dict[str, Any]:
    return {"type": "section", "text": {"type": "mrkdwn", "text": text[:3000]}}


def _slack_context(text: str) -> dict[str, Any]:
    return {"type": "context", "elements": [{"type": "mrkdwn", "text": text[:3000]}]}

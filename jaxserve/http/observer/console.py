"""The console's part of the observer: keeps what the page draws, and answers it.

`/console/data` is one document, of which only what is new is told again; `/console/request` is one
request's time. Both need an admin's key. What SLOs, costs and alerts have to say the page asks of
their own routes.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import msgspec

from jaxserve.config import TelemetryConfig
from jaxserve.errors import InvalidRequest
from jaxserve.http.console import RequestNotFound
from jaxserve.http.observer.messages import Answer, News, Question
from jaxserve.http.observer.part import Part
from jaxserve.telemetry.live import RINGS, Live
from jaxserve.telemetry.waterfall import document
from jaxserve.text.fields import show

_STEPS = {str(step_s): step_s for step_s, _ in RINGS}
#: Larger numbers are nobody's.
_MAX_NUMBER = 2**53


def console_part(
    *,
    config: TelemetryConfig | None = None,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    wall_s: Callable[[], float] = time.time,
) -> Part:
    """The part.

    Args:
        config: what the devices can do, where it says so; the defaults where None.
    """
    live = Live(clock_ns, wall_s)
    server = {"jaxserve": _version(), "python": platform.python_version()}

    def on_news(news: News) -> None:
        live.news(news.kind, news.at_ns, news.subject)

    async def data(question: Question) -> Answer:
        query = question.query
        if (step := query.get("step", "1")) not in _STEPS:
            raise InvalidRequest(
                f"step is {show(step)}; it must be {' or '.join(_STEPS)}", param="step"
            )
        peaks = live.peaks(config or TelemetryConfig())
        told = live.now() | {
            "server": server,
            "peaks": peaks,
            "series": live.series(_STEPS[step], _number(query, "since", -1)),
            "requests": live.requests(_number(query, "requests", 0)),
        }
        return Answer(body=msgspec.json.encode(told))

    async def request(question: Question) -> Answer:
        request_id = question.query.get("id", "")
        record = live.record(request_id)
        if record is None:
            raise RequestNotFound(
                f"request {show(request_id)} is not among the last ones that ended; its id is the "
                "x-request-id of the response",
                param="id",
            )
        return Answer(body=msgspec.json.encode(document(record)))

    return Part(
        name="console",
        begun=live.begun,
        ended=live.ended,
        step=live.step,
        status=live.status,
        news=on_news,
        asks={"console": data, "request": request},
    )


def _number(query: dict[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None or text == "-1":
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 17 and int(text) < _MAX_NUMBER):
        raise InvalidRequest(f"{name} is {show(text)}; it must be a whole number", param=name)
    return int(text)


def _version() -> str:
    try:
        return version("jaxserve")
    except PackageNotFoundError:
        return "from source"

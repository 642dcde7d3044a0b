"""The observer's part that notices deployments: what serves now is another than what served before.

What was deployed is kept in the state directory. Software, model files and settings are known at
the start; the device is once the engine has said what it computes on, and is compared each time it
says it again, since an engine may come back with fewer. Changes are told to all parts as news:
baselines begin anew, and the console shows them. Adapters that come and go are no deployment.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from jaxserve.http.observer.part import Part
from jaxserve.protocol.status import EngineStatus
from jaxserve.telemetry.baselines.identity import Deployment, device_name
from jaxserve.telemetry.document import Document

logger = logging.getLogger(__name__)

DEPLOYMENT_FILE = "deployment.json"
DEPLOYMENT_VERSION = 1

#: Tells all parts: kind and subject of `messages.News`.
SayNews = Callable[[str, str], None]


def make_deployment(mine: Deployment, state: Path, news: SayNews) -> Part:
    """The part.

    Args:
        mine: what is deployed, as far as it is known.
        state: directory of what outlives this process.
        news: `Observer.news`.
    """
    document = Document(state / DEPLOYMENT_FILE, DEPLOYMENT_VERSION)
    before = _load(document)
    unsaved = False
    failing = False

    def on_status(status: EngineStatus) -> None:
        nonlocal before, unsaved
        if status.model is None:
            return
        now = dataclasses.replace(mine, device=device_name(status.device))
        if now == before:
            return
        changes = list(now.changes(before)) if before is not None else []
        before, unsaved = now, True
        for kind, subject in changes:
            logger.info("%s: %s", kind, subject)
            news(kind, subject)

    async def save() -> None:
        nonlocal unsaved, failing
        if not unsaved:
            return
        assert before is not None
        saved = before
        try:
            await asyncio.to_thread(document.save, dataclasses.asdict(saved))
        except OSError as error:
            if not failing:
                logger.error("what is deployed cannot be kept: %s", error.strerror or error)
            failing = True
            return
        failing = False
        unsaved = saved is not before

    return Part(name="deployment", status=on_status, tick=save, close=save)


def _load(document: Document) -> Deployment | None:
    state = document.load()
    if state is None:
        return None
    try:
        return Deployment.read(state)
    except (KeyError, TypeError, ValueError) as error:
        document.set_aside(f"{type(error).__name__}: {error}")
        return None

"""What operators ask: is it alive, is it ready, what does it serve."""

from __future__ import annotations

from typing import Any

from jaxserve.errors import JaxserveError, ModelNotFound
from jaxserve.http.adapters import adapter_card
from jaxserve.http.errors import send_json
from jaxserve.http.frontend import Frontend
from jaxserve.protocol.status import EngineStatus, Progress
from jaxserve.text.fields import show


def engine_card(status: EngineStatus | None, error: JaxserveError | None) -> dict[str, Any]:
    """An engine as /health tells of it.

    Args:
        status: its last word; None before the first.
        error: why it is dead for good; None while it is not.
    """
    return {
        "id": 0,
        "pid": status.pid if status else None,
        "state": "failed" if error else status.state if status else "starting",
        "step_age_s": round(status.step_age_s, 3) if status else None,
    }


def progress_card(progress: Progress) -> dict[str, Any]:
    """Start-up's progress as /ready tells of it."""
    return {"phase": progress.phase, "done": progress.done, "total": progress.total}


class Health:
    """/health and /live: 200 while this process and the engine live, whether or not it is ready."""

    def __init__(self, frontend: Frontend) -> None:
        self._client = frontend.client

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers with the engine's state."""
        status, error = self._client.status, self._client.error
        document: dict[str, Any] = {
            "status": "failed" if error else "ok",
            "engines": [engine_card(status, error)],
        }
        if error:
            document["error"] = error.message
        await send_json(send, document, status=503 if error else 200)


class Ready:
    """/ready: 200 when a request would be served now; else 503, with how far start-up is."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers with the state, and start-up's progress where there is some."""
        client = self._frontend.client
        status, progress = client.status, client.progress
        state = status.state if status else "starting"
        if client.error:
            state = "failed"
        elif self._frontend.draining:
            state = "draining"
        document: dict[str, Any] = {"status": state}
        if state not in ("ready", "failed", "draining") and progress is not None:
            document["progress"] = progress_card(progress)
        await send_json(send, document, status=200 if state == "ready" else 503)


class Models:
    """/v1/models and /v1/models/{name}: what generates, its adapters, and what embeds."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers with a model or an adapter, or the list of them."""
        model = self._frontend.model()
        cards = {model.name: self._card(model.name, model.max_context)}
        status = self._frontend.client.status
        if status is not None and status.embedding is not None:
            embeds = status.embedding
            cards.setdefault(embeds.name, self._card(embeds.name, embeds.max_length))
        name, created_s = scope["path_params"].get("name"), self._frontend.started_s
        if name is None:
            adapters = self._frontend.adapters.names().items()
            listed = [*cards.values(), *(adapter_card(*a, model, created_s) for a in adapters)]
            await send_json(send, {"object": "list", "data": listed})
        elif name in cards:
            await send_json(send, cards[name])
        elif (found := await self._frontend.adapters.look_up(name, model)) is not None:
            await send_json(send, adapter_card(*found, model, created_s))
        else:
            known = " and ".join(map(repr, cards))
            verb = "are" if len(cards) > 1 else "is"
            raise ModelNotFound(
                f"model {show(name)} is not served here; {known} {verb}", param="model"
            )

    def _card(self, name: str, max_length: int) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._frontend.started_s,
            "owned_by": "jaxserve",
            "max_model_len": max_length,
        }

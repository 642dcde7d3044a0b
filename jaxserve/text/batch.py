"""Arguments of an offline call, which may be one prompt or many, as requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from jaxserve.errors import InvalidRequest
from jaxserve.text.request import Request, make_request


def requests_of(field: str, prompts: list[Any], options: dict[str, Any]) -> list[Request]:
    """One for each prompt, with its own adapter where they are listed."""
    adapters = options.pop("adapter", None)
    if not isinstance(adapters, list | tuple):
        adapters = [adapters] * len(prompts)
    if len(adapters) != len(prompts):
        raise InvalidRequest(
            f"adapter names {len(adapters)} for {len(prompts)} prompts: give one for each, or one "
            "for all",
            param="adapter",
        )
    return [
        make_request(**{field: prompt}, adapter=adapter, **options)
        for prompt, adapter in zip(prompts, adapters, strict=True)
    ]


def listed(prompts: Any) -> list[Any]:
    """A batch: one prompt is a batch of one, and so is what cannot be any."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    found = list(prompts)
    return [found] if found and isinstance(found[0], Integral) else found


def is_conversation(value: Any) -> bool:
    """Whether it is the messages of one, and not a prompt nor several conversations."""
    return (
        not isinstance(value, str | Mapping)
        and isinstance(value, Sequence)
        and len(value) > 0
        and isinstance(value[0], Mapping)
    )

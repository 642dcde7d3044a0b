"""A request for text as the scheduler takes it: checked, with its sequences' names.

Texts to embed have the same in `engine.embedding`.
"""

from __future__ import annotations

from collections.abc import Hashable

from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.check import check_submit, request_number
from jaxserve.protocol.messages import Submit
from jaxserve.scheduler.copies import Schedulers
from jaxserve.scheduler.sequence import Resumed, Sequence
from jaxserve.types import ModelInfo


def submit_prompt(
    scheduler: Schedulers,
    client: Hashable,
    message: Submit,
    model: ModelInfo,
    adapters: RequestAdapters,
) -> list[Sequence]:
    """Lets a request in: a sequence for each of its ids, all over one prompt.

    Raises:
        InvalidRequest: a value is outside what the engine can hold.
        ContextTooLong, OutOfPages: it would never fit.
        Overloaded: too many wait.
    """
    return scheduler.submit(
        [(client, sequence_id) for sequence_id in message.sequence_ids],
        check_submit(message, model),
        message.sampling,
        priority=message.priority,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        weight=message.weight,
        arrived_ns=message.arrived_ns,
        request=request_number(message.request_key),
        resumed=_resumed(message),
        adapter=adapters.use_of(message),
    )


def _resumed(message: Submit) -> Resumed | None:
    """How far another life of the engine had come with a checked request; None if it is new."""
    if message.attempt == 0:
        return None
    num_choices = len(message.sequence_ids)
    return Resumed(
        choices=message.choices or list(range(num_choices)),
        emitted=message.emitted or [[]] * num_choices,
        queued_ns=message.queued_ns or [0] * num_choices,
        num_prompt_logprobs=message.prompt_logprobs_done,
    )

"""How long a new request would wait for the engine, from what the engine says of its load.

Two queues stand before the first token: a row must come free, and prompts must be computed. The
wait is the longer of the two, counting only what is served before the newcomer: better and equal
priorities, and of the other tenants at most what their weight gives them until the newcomer's
turn. Rows of worse priority give way. Nothing is known before the first sequences have ended, and
the wait is 0 then.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxserve.protocol.status import ClassLoad, EngineStatus

#: A pool that is fuller than this has no room for newcomers, even if rows are free.
FULL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Newcomer:
    """Who would come.

    Attributes:
        tenant, weight: None for the tenant: behind all that is before it, whoever it is of.
        sequences, tokens: how many, and of prompt each.
        output_tokens: at most, each; None if it is not known.
    """

    priority: int
    tenant: str | None = None
    weight: float = 1.0
    sequences: int = 1
    tokens: int = 0
    output_tokens: int | None = None


def wait_s(status: EngineStatus, loads: list[ClassLoad], newcomer: Newcomer) -> float:
    """Seconds until its first token.

    Args:
        loads: the status's, with what has been submitted since.
    """
    before = [load for load in loads if load.priority <= newcomer.priority]
    waiting = _before(newcomer, [(load, load.waiting) for load in before], newcomer.sequences)
    tokens = _before(newcomer, [(load, load.tokens) for load in before], newcomer.tokens)
    running = sum(load.running for load in loads)
    has_pages = status.pages_used < FULL * status.pages_total
    free = max(0, status.max_rows - running) if has_pages else 0
    free += sum(load.running for load in loads if load.priority > newcomer.priority)
    missing = waiting + newcomer.sequences - free
    for_row_s = max(0.0, missing) * status.service_s / max(running, 1)
    rate = status.prefill_tokens_per_s
    for_prompt_s = (tokens + newcomer.tokens) / rate if rate else 0.0
    return max(for_row_s, for_prompt_s)


def is_free(status: EngineStatus, loads: list[ClassLoad], newcomer: Newcomer) -> bool:
    """Whether it would wait for nobody: all that is before its first token is its own prompt."""
    return wait_s(status, loads, dataclasses.replace(newcomer, tokens=0)) == 0


def run_s(status: EngineStatus, newcomer: Newcomer) -> float:
    """Seconds that it would run, once it does.

    As long as others did, or longer if it asks for so much that others would, and never longer
    than all that it asks for takes.
    """
    if newcomer.output_tokens is None:
        return status.service_s
    most_s = newcomer.output_tokens * status.token_s
    return min(most_s, max(status.service_s, most_s * status.output_share))


def _before(newcomer: Newcomer, amounts: list[tuple[ClassLoad, int]], own: int) -> float:
    """What of these amounts is served before the newcomer's own."""
    if newcomer.tenant is None:
        return sum(amount for _, amount in amounts)
    mine = sum(amount for load, amount in amounts if load.tenant == newcomer.tenant)
    total = float(mine)
    for load, amount in amounts:
        if load.tenant == newcomer.tenant:
            continue
        if load.priority < newcomer.priority:
            total += amount
        else:
            total += min(amount, (mine + max(own, 1)) * load.weight / newcomer.weight)
    return total

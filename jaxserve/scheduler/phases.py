"""What kind of step comes next, where a request's output must not depend on what else runs.

Usually a step mixes: decoding rows and chunks of known tokens, in whatever program holds them. Two
programs may round differently, so that with `engine.batch_invariant` each position has one way of
being computed: a prompt's in steps that hold one chunk of one prompt, cut at multiples of the
step's tokens; an output token's in steps that hold one token a row, also when it is computed again
after a preemption. The two kinds take turns while there is work for both.
"""

from __future__ import annotations

import enum

from jaxserve.scheduler.sequence import Sequence


class Phase(enum.Enum):
    """What a step may hold."""

    MIXED = enum.auto()
    PROMPTS = enum.auto()
    OUTPUTS = enum.auto()


#: The kinds of step that take turns.
IN_TURN = {Phase.PROMPTS: Phase.OUTPUTS, Phase.OUTPUTS: Phase.PROMPTS}


def phase_of(sequence: Sequence) -> Phase:
    """The kind of step that a sequence's next known token is computed in."""
    in_prompt = sequence.num_computed < sequence.prompt_len
    return Phase.PROMPTS if in_prompt else Phase.OUTPUTS


def chunk_end(phase: Phase, sequence: Sequence, budget: int) -> int:
    """How far a step of this kind brings a sequence; where it stands, if not at all.

    Args:
        budget: tokens left in the step; a step of prompts has all of them, or none.
    """
    start = sequence.num_computed
    if phase is Phase.MIXED:
        return min(start + budget, len(sequence.token_ids))
    if phase is not phase_of(sequence):
        return start
    if phase is Phase.OUTPUTS:
        return start + min(budget, 1)
    return min((start // budget + 1) * budget, sequence.prompt_len) if budget else start

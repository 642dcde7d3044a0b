"""A look at where a compiled grammar leads: one that soon passes a limit is refused at once.

The library makes its automata as the output goes on, so that a grammar may compile, and have a
first mask, and yet need more than `step_fuel` a few tokens later: `(\\p{L}{1,50}\\s?){1,300}` does.
Some outputs are begun here, of tokens drawn from the masks. That finds what most outputs would come
to; what only some do is found when it happens, and ends their row.
"""

from __future__ import annotations

import random
import time

import numpy as np
from jaxtyping import UInt

from jaxserve.errors import GrammarError
from jaxserve.structured.matcher import Compiled, Matcher

#: Outputs that are begun, and their tokens at most.
_NUM_WALKS, _NUM_TOKENS = 4, 16
#: CPU time after which no other token is looked at: it is others' turn.
_LIMIT_S = 0.25


def probe(compiled: Compiled, vocab_size: int) -> None:
    """Returns where nothing speaks against a grammar; the same each time, but for slow ones.

    Args:
        vocab_size: of the model's logits.

    Raises:
        GrammarError: an output could not be held to it.
    """
    end_s = time.thread_time() + _LIMIT_S
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    for seed in range(_NUM_WALKS):
        chooser, matcher = random.Random(seed), compiled.matcher()
        for num_tokens in range(_NUM_TOKENS):
            if time.thread_time() > end_s:
                return
            if _step(matcher, mask, chooser):
                continue
            if matcher.ll.is_error():
                raise GrammarError(
                    f"it is too complex to hold an output to: after {num_tokens} tokens, "
                    f"{matcher.fault()}; send a simpler one"
                )
            break


def _step(matcher: Matcher, mask: UInt[np.ndarray, "W"], chooser: random.Random) -> bool:
    """Takes one of the tokens that may come; False where the output has come to an end."""
    matcher.ll.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    words = np.flatnonzero(mask)
    if matcher.ll.is_error() or not len(words):
        return False
    place = int(words[chooser.randrange(len(words))])
    word = int(mask[place])
    bits = [bit for bit in range(32) if word >> bit & 1]
    return matcher.ll.consume_token(32 * place + chooser.choice(bits)) and not (
        matcher.ll.is_stopped()
    )

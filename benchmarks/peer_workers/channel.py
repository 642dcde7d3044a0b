"""How benchmarks/peers.py talks to a peer: JSON lines, a command in, an answer out.

Standard library only: it runs in each peer's own Python. A worker calls `serve` with an object
that has `describe`, `decode` and `prefill`; anything that its libraries print goes to stderr.

    {"op": "decode", "prompts": [[…], …], "steps": 32}  →  {"seconds": …, "outputs": […]}
    {"op": "prefill", "prompts": [[…]]}                 →  the same, with one output token

`decode` prefills the prompts, untimed, which gives each its first token; then `steps` more tokens
of each are timed. `prefill` times one prompt up to its first token. Outputs are the first
sequence's tokens, so that one sees that all peers run the same model.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Protocol

Measured = tuple[float, list[int]]


class Peer(Protocol):
    """What a worker measures; both return seconds and the first sequence's tokens."""

    def describe(self) -> str:
        """Versions and settings, for the table's foot."""
        ...

    def decode(self, prompts: list[list[int]], steps: int) -> Measured:
        """Times `steps` decode steps of all prompts together."""
        ...

    def prefill(self, prompt: list[int]) -> Measured:
        """Times one prompt to its first token."""
        ...


class Channel:
    """Claims stdout for answers, before libraries are imported that print to it."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def serve(self, peer: Peer) -> None:
        """Answers commands until stdin ends."""
        self._answer({"about": peer.describe()})
        for line in sys.stdin:
            command = json.loads(line)
            if command["op"] == "decode":
                seconds, outputs = peer.decode(command["prompts"], command["steps"])
            else:
                seconds, outputs = peer.prefill(command["prompts"][0])
            self._answer({"seconds": seconds, "outputs": outputs})

    def _answer(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

"""Progress of a start-up on stderr: one bar a phase.

Part of the floor.
"""

from __future__ import annotations

import sys
from typing import Any, Self

from tqdm import tqdm

#: A phase of more than so many is counted in bytes.
_COUNTS = 1_000_000


class StartupBars:
    """As a context manager, so that none is left open.

    Args:
        shown: None where stderr is a terminal.
        stay: whether a bar stays on the screen when its phase is over.
    """

    def __init__(self, shown: bool | None = True, *, stay: bool = False) -> None:
        self._hidden = hidden(shown)
        self._stay = stay
        self._phase = ""
        self._bar: tqdm[Any] | None = None

    def show(self, phase: str, done: int, total: int) -> None:
        """How far a phase is, once its size is known; sizes over a million are bytes."""
        if not total:
            return
        if phase != self._phase or self._bar is None:
            self.close()
            self._phase = phase
            in_bytes = total > _COUNTS
            self._bar = tqdm(
                total=total,
                desc=phase,
                unit="B" if in_bytes else "",
                unit_scale=in_bytes,
                disable=self._hidden,
                leave=self._stay,
                file=sys.stderr,
            )
        self._bar.total = total
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        """Ends the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hidden(shown: bool | None) -> bool | None:
    """tqdm's `disable`: None has it ask whether stderr is a terminal."""
    return None if shown is None else not shown

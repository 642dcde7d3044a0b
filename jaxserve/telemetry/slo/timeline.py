"""The time that counts are booked by: it never runs backwards, and no step of a clock moves it.

Seconds since 1970 as they were when it began, from then on by CLOCK_MONOTONIC. After a restart on
the same boot of the machine it goes on as if it had never stopped; after another boot it goes on
from the wall clock, unless that is behind what has been booked.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: A wall clock that is this far behind is worth a word.
_BEHIND_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """One moment, to go on from.

    Attributes:
        at_s: on the timeline.
        monotonic_ns: the same on CLOCK_MONOTONIC of a boot of the machine.
    """

    at_s: float
    monotonic_ns: int
    boot: str


class Timeline:
    """See the module.

    Args:
        now_ns, wall_s: CLOCK_MONOTONIC and the wall clock now.
        boot: which boot of the machine this is; empty where that is not known.
        last: where it was left.
    """

    def __init__(self, now_ns: int, wall_s: float, boot: str, last: Instant | None = None) -> None:
        self._boot = boot
        self._offset_s = wall_s - now_ns / 1e9
        if last is None:
            return
        if boot and last.boot == boot and now_ns >= last.monotonic_ns:
            self._offset_s = last.at_s - last.monotonic_ns / 1e9
        elif wall_s < last.at_s:
            self._offset_s = last.at_s - now_ns / 1e9
            if last.at_s - wall_s > _BEHIND_S:
                logger.warning(
                    "the clock is %.0f s behind what was counted; SLO windows go on from there",
                    last.at_s - wall_s,
                )

    def at_s(self, monotonic_ns: int) -> float:
        """A moment of CLOCK_MONOTONIC on the timeline."""
        return self._offset_s + monotonic_ns / 1e9

    def instant(self, now_ns: int) -> Instant:
        """To go on from after a restart."""
        return Instant(at_s=self.at_s(now_ns), monotonic_ns=now_ns, boot=self._boot)


def read_boot() -> str:
    """Which boot of the machine this is; empty where the system does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""

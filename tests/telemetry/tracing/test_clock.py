"""Steps of the wall clock change neither the order nor the lengths of spans."""

from __future__ import annotations

import pytest

from jaxserve.telemetry.tracing.clock import WallClock

S = 1_000_000_000


class Clocks:
    """A machine's two clocks."""

    def __init__(self) -> None:
        self.monotonic_ns = 1000 * S
        self.wall_ns = 1_700_000_000 * S

    def clock(self) -> WallClock:
        return WallClock(lambda: self.monotonic_ns, lambda: self.wall_ns)

    def pass_s(self, seconds: float) -> None:
        self.monotonic_ns += int(seconds * S)
        self.wall_ns += int(seconds * S)


def test_times_are_of_the_wall_clock() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    clocks.pass_s(5)
    assert not clock.refresh()
    assert clocks.monotonic_ns + clock.offset_ns == clocks.wall_ns


@pytest.mark.parametrize("step_s", [-3600, -0.1, 0.1, 86400])
def test_a_step_is_followed_between_requests_only(step_s: float) -> None:
    clocks = Clocks()
    clock = clocks.clock()
    before_ns = clock.offset_ns
    clocks.wall_ns += int(step_s * S)
    assert clock.offset_ns == before_ns  # until somebody says that it may
    assert clock.refresh()
    assert clocks.monotonic_ns + clock.offset_ns == clocks.wall_ns
    assert not clock.refresh()


def test_noise_between_the_two_looks_is_no_step() -> None:
    clocks = Clocks()
    clock = clocks.clock()
    before_ns = clock.offset_ns
    clocks.wall_ns += S // 100
    assert not clock.refresh()
    assert clock.offset_ns == before_ns

"""Step pacing against devices of simulated speed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from jaxserve.scheduler.pace import MIN_CHUNK_TOKENS, Pacer

MOST = 512


def linear(rows: int, tokens: int) -> float:
    """A device that takes what the tokens take: ms."""
    return 4.0 + 0.02 * rows + 0.05 * tokens


def stairs(rows: int, tokens: int) -> float:
    """One that pads to powers of two."""
    padded = 1 << max(rows + tokens - 1, 0).bit_length()
    return 4.0 + 0.05 * padded


def floor_heavy(rows: int, tokens: int) -> float:
    """One whose step without any chunk takes most of the target already."""
    return 17.0 + 0.01 * (rows + tokens)


class Device:
    """Steps with a prompt always at hand, measured two steps later as in the loop."""

    def __init__(self, pacer: Pacer, time_ms: Callable[[int, int], float], noise: float) -> None:
        self.pacer = pacer
        self.time_ms = time_ms
        self.noise = noise
        self.draw = random.Random(3)
        self.unread: list[tuple[int, float]] = []

    def run(self, num_steps: int, rows: int, chance: float = 0.9) -> list[tuple[int, float]]:
        """(prefill tokens, ms) of each step that has some."""
        steps = []
        for _ in range(num_steps):
            tokens = 0
            if self.draw.random() < chance:
                tokens = self.pacer.budget(rows, MOST - rows)
            took = self.time_ms(rows, tokens) * self.draw.gauss(1.0, self.noise)
            self.unread.append((rows + tokens, took * 1e6))
            if len(self.unread) > 2:
                self.pacer.observe(*self.unread.pop(0))
            if tokens:
                steps.append((tokens, took))
        return steps


def over(steps: list[tuple[int, float]], target_ms: float) -> float:
    """The share of steps that took longer."""
    return sum(took > target_ms for _, took in steps) / len(steps)


@pytest.mark.parametrize("time_ms", [linear, stairs, floor_heavy])
@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("rows", [1, 32])
def test_it_converges_and_keeps_the_bound(time_ms, noise, rows):
    target_ms = 20.0
    device = Device(Pacer(target_ms, MOST), time_ms, noise)
    device.run(600, rows)
    steps = device.run(3000, rows)
    assert over(steps, target_ms) <= 0.01
    # Not by doing nothing: within a bin, a stair and the spread of what would fit.
    fits = max(t for t in range(1, MOST - rows) if time_ms(rows, t) <= target_ms * 0.9)
    tokens = sorted(tokens for tokens, _ in steps)
    assert tokens[len(tokens) // 2] >= fits / 1.6


def test_it_follows_a_device_that_slows_down_and_speeds_up():
    factor = 1.0
    pacer = Pacer(20.0, MOST)
    device = Device(pacer, lambda rows, tokens: factor * linear(rows, tokens), 0.02)
    fast = device.run(400, 8)[-1][0]
    factor = 2.0
    device.run(30, 8)
    slow = device.run(2000, 8)
    assert over(slow, 20.0) <= 0.01
    assert slow[-1][0] < fast / 2
    factor = 1.0
    device.run(300, 8)
    assert device.run(100, 8)[-1][0] >= fast / 1.5


def test_one_odd_measurement_is_forgotten():
    pacer = Pacer(20.0, MOST)
    device = Device(pacer, linear, 0.0)
    before = device.run(300, 8)[-1][0]
    for _ in range(2):
        pacer.observe(8 + before, 500e6)
    device.run(1200, 8)
    assert device.run(20, 8)[-1][0] >= before / 1.3


def test_prefill_never_stops_and_the_rest_is_free():
    pacer = Pacer(0.001, MOST)
    assert pacer.budget(0, 512) == 512  # nobody is delayed
    for _ in range(100):
        pacer.observe(8 + MIN_CHUNK_TOKENS, 50e6)
    assert pacer.budget(8, 504) == MIN_CHUNK_TOKENS
    assert pacer.budget(8, 5) == 5


def test_off_it_bounds_nothing():
    pacer = Pacer(0.0, MOST)
    pacer.observe(100, 1e12)
    assert pacer.budget(8, 504) == 504

"""Fair share: the bound of the gap over random traces, throughput, and what a flood does."""

from __future__ import annotations

import math
import random

import pytest

from jaxserve.config import SchedulerConfig
from tests.scheduler.driver import Driver

NUM_TRACES = 1000


def trace(seed: int, fairness: str = "vtc") -> Driver:
    """A random trace, run to its end: weights, bursts, priorities, choices, stops and cancels."""
    draw = random.Random(seed)
    page_size = draw.choice([1, 4, 8])
    longest = draw.choice([12, 40])
    num_pages = 1 + math.ceil(2 * longest / page_size) + draw.choice([0, 3, 40])
    driver = Driver(
        SchedulerConfig(
            max_rows=draw.randint(1, 6),
            max_step_tokens=draw.choice([6, 16, 64]),
            decode_steps=draw.choice([1, 3]),
            fairness=fairness,
            input_token_price=draw.choice([0.0, 0.5, 1.0, 1.0]),
            output_token_price=draw.choice([1.0, 2.0]),
            locality_quantum_tokens=draw.choice([1, 50]),
        ),
        num_pages=num_pages,
        page_size=page_size,
        stop_chance=draw.choice([0.0, 0.05]),
        seed=seed,
    )
    tenants = [f"tenant {number}" for number in range(draw.randint(2, 5))]
    weights = {tenant: draw.choice([1.0, 1.0, 0.5, 3.0]) for tenant in tenants}
    priorities = draw.choice([[0], [0, 0, 0, 1, -1]])
    for _ in range(draw.randint(5, 25)):
        tenant = draw.choice(tenants)
        for _ in range(draw.choice([1, 1, 4, 12])):
            driver.submit(
                draw.randint(1, longest),
                draw.randint(1, longest),
                tenant=tenant,
                weight=weights[tenant],
                priority=draw.choice(priorities),
                n=draw.choice([1, 1, 1, 3]),
            )
        for _ in range(draw.randint(0, 8)):
            driver.turn()
        if draw.random() < 0.2:
            driver.cancel(draw.choice(driver.sequences))
    driver.check_accounts()
    driver.run()
    return driver


def bound(driver: Driver, one: str, other: str) -> float:
    """2·max(w_in·longest prompt, w_out·M) for weights of 1; each weight divides its half."""
    config = driver.config
    longest = max(sequence.prompt_len for sequence in driver.sequences)
    capacity = (driver.num_pages - 1) * driver.page_size
    served = max(config.input_token_price * longest, config.output_token_price * capacity)
    if config.fairness == "locality":
        served += config.locality_quantum_tokens
    return served / driver.weights[one] + served / driver.weights[other]


@pytest.mark.parametrize("part", range(4))
def test_the_gap_between_tenants_that_wait_never_exceeds_the_bound(part):
    widest = 0.0
    for seed in range(part, NUM_TRACES, 4):
        driver = trace(seed)
        for (_, one, other), gap in driver.widest.items():
            assert gap <= bound(driver, one, other) + 1e-6, (seed, one, other)
            widest = max(widest, gap / bound(driver, one, other))
    assert widest > 0.3  # the traces come near enough to mean something

"""Several copies of the model: one account a tenant."""

from __future__ import annotations

from jaxserve.config import SchedulerConfig
from jaxserve.scheduler.copies import Schedulers
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import SamplingParams
from tests.scheduler.driver import MODEL, TOKEN


def test_what_one_copy_serves_counts_in_the_other():
    config = SchedulerConfig(max_rows=1, max_step_tokens=64, decode_steps=1)
    schedulers = Schedulers(config, MODEL, page_size=4, num_pages=[200], copies=2)
    sent: list[Sequence] = []

    def submit(copy: int, tenant: str, prompt_len: int, max_tokens: int = 1) -> None:
        sent.extend(
            schedulers._schedulers[copy].submit(
                [("client", len(sent))],
                [TOKEN] * prompt_len,
                SamplingParams(max_tokens=max_tokens, seed=0),
                tenant=tenant,
            )
        )
        sent[-1].copy = copy

    submit(1, "runs", 3, max_tokens=5)
    assert schedulers.plan() is not None
    submit(1, "served elsewhere", 6)
    submit(1, "other", 7)
    submit(0, "served elsewhere", 50)
    prompts = []
    for _ in range(12):
        plans = schedulers.plan()
        if plans is not None and plans[1] is not None:
            prompts += [len(chunk.token_ids) for chunk in plans[1].chunks]
    assert prompts == [7, 6]  # though the other came later
    _, first, _, elsewhere = sent
    assert first.account is elsewhere.account is not None
    # It ends where the tenants that it waited with began, by what it was served.
    begun = 3 + 2
    assert first.account.counter == begun + 50 + 6 + 2 * 2

"""engine.batch_invariant: a request's output is the same to the last bit in whatever company."""

from __future__ import annotations

import pytest

from jaxserve.config import Config
from jaxserve.engine.load import load_parts
from jaxserve.engine.thread import EngineThread
from jaxserve.protocol.client import SyncClient
from jaxserve.settings import load_config
from jaxserve.types import SamplingParams
from tests.models.loading import ORACLE

Result = tuple[list[int], list[float], int]


def config_of(*settings: str) -> Config:
    return load_config(
        settings=[
            f"model.path={ORACLE / 'llama3'}",
            "engine.batch_invariant=true",
            "scheduler.max_rows=6",
            "scheduler.max_step_tokens=32",
            "cache.page_size=4",
            "cache.num_pages=28",
            "kernels.layers=scanned",
            *settings,
        ],
        environ={},
    )


def results(client: SyncClient, prompts: dict[int, list[int]]) -> list[Result]:
    """Tokens, log-probabilities and preemptions of each prompt, by its seed, all at once."""
    streams = [
        client.submit(
            prompt,
            SamplingParams(
                max_tokens=20,
                seed=seed,
                temperature=0.8 * (seed % 2),
                ignore_eos=True,
                logprobs=0,
                prompt_logprobs=0 if prompt[0] == 3 else None,
            ),
            priority=-prompt[0],
        )
        for seed, prompt in prompts.items()
    ]
    found: list[Result] = []
    for stream in streams:
        events = list(stream)
        record = events[-1].finished.record
        found.append(
            (
                [token for event in events for token in event.token_ids],
                [entry.logprob for event in events for entry in event.prompt_logprobs]
                + [entry.logprob for event in events for entry in event.logprobs],
                record.preemptions,
            )
        )
    return found


@pytest.mark.slow
@pytest.mark.in_turn
@pytest.mark.parametrize("kernels", ["xla", "auto"])
def test_company_changes_no_bit(kernels: str) -> None:
    prompts = {first: [first, *range(10, 14 + 8 * first)] for first in (1, 2, 3, 4)}
    crowd = prompts | {9 + i: [9, 50 + i, 51, 52] for i in range(6)}
    settings = [f"kernels.{name}={kernels}" for name in ("matmul", "attention")]
    with EngineThread(config_of(*settings), load_parts) as thread:
        client = SyncClient(thread.connect())
        client.start()
        alone = [results(client, {seed: prompt})[0] for seed, prompt in prompts.items()]
        together = results(client, crowd)[: len(prompts)]
        client.close()
    assert any(preemptions for _, _, preemptions in together)
    assert [result[:2] for result in together] == [result[:2] for result in alone]

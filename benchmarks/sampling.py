"""What does choosing tokens cost a step, by batch size and parameters?

Method: one jitted `sample` (as in the step program, state passed in), vocabulary of SmolLM2,
logits shaped like a language model's (a power law over ranks, steep in some rows and flat in
others). Cases are interleaved, so that a drift of the machine hits all alike; each call is
synchronised. On a busy machine the best of many rounds says more than their median. The read bound
is the time of one maximum over the logits in the same run.

    python benchmarks/sampling.py [--rounds 50] [--vocab-size 49152] [--rows 1 8 32 64]

Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.sampling import history, logprobs, sample, slots, state
from jaxserve.types import SamplingParams

PLAIN = SamplingParams(max_tokens=100, seed=1)
CASES = {
    "greedy": replace(PLAIN, temperature=0.0),
    "temperature": replace(PLAIN, temperature=0.8),
    "top_p": replace(PLAIN, temperature=0.8, top_p=0.9),
    "top_k": replace(PLAIN, temperature=0.8, top_k=50),
    "top_k+top_p": replace(PLAIN, temperature=0.8, top_k=50, top_p=0.9),
    "penalties": replace(PLAIN, temperature=0.0, presence_penalty=0.5, repetition_penalty=1.1),
    "everything": replace(
        PLAIN,
        temperature=0.8,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias=tuple((token, 1.0) for token in range(100)),
        allowed_token_ids=tuple(range(49000)),
        bad_words=((1, 2), (3,)),
        min_tokens=50,
        stop_token_ids=(7,),
    ),
}


def language_logits(num_rows: int, vocab_size: int) -> jax.Array:
    """Logits falling by a power of the rank, steeper or flatter by row, in random token order."""
    rng = np.random.default_rng(0)
    steepness = np.linspace(1.2, 3.0, num_rows)[:, None]
    logits = -steepness * np.log(1 + np.arange(vocab_size)) + 15
    logits += rng.normal(size=logits.shape) * 0.3
    return jnp.asarray(rng.permuted(logits, axis=1), jnp.float32)


def filled_state(sampling: SamplingParams, num_rows: int, vocab_size: int) -> state.SamplingState:
    """State of `num_rows` slots, all with the same parameters."""
    writes = [
        slots.SlotSettings(slot=row, sampling=replace(sampling, seed=row), prompt_len=10, choice=0)
        for row in range(num_rows)
    ]
    arrays = slots.pack_writes(writes, eos_token_ids=(0,), vocab_size=vocab_size, max_rows=num_rows)
    return jax.jit(slots.apply_writes)(state.init_state(num_rows, vocab_size), arrays)


def main() -> None:
    """Measures all cases and prints a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--cases", nargs="+", default=None)
    options = parser.parse_args()

    runs = {}
    sample_rows = jax.jit(sample.sample)
    observe = jax.jit(history.observe, donate_argnums=0)
    read = jax.jit(lambda logits: jnp.max(logits, axis=1))
    top = jax.jit(logprobs.logprobs)
    for num_rows in options.rows:
        logits = language_logits(num_rows, options.vocab_size)
        index = jnp.arange(num_rows, dtype=jnp.int32)
        live = jnp.ones(num_rows, bool)
        ids = jnp.zeros(num_rows, jnp.int32)
        places = [ids + 20 + step for step in range(options.rounds + 3)]
        runs["read bound", num_rows] = lambda step, a=(logits,): read(*a)
        runs["logprobs", num_rows] = lambda step, a=(logits, ids): top(*a)
        for name, sampling in CASES.items():
            held = filled_state(sampling, num_rows, options.vocab_size)
            runs[name, num_rows] = lambda step, a=(logits, held, index), at=places, live=live: (
                sample_rows(*a, at[step], live)
            )
        counted = [filled_state(CASES["everything"], num_rows, options.vocab_size)]

        def observe_step(step, held=counted, ids=ids, index=index, at=places, live=live):
            held[0] = observe(held[0], ids, index, at[step], live)
            return held[0].recent

        runs["observe", num_rows] = observe_step
    if options.cases:
        runs = {key: run for key, run in runs.items() if key[0] in options.cases}

    times = {key: [] for key in runs}
    for step in range(options.rounds + 3):
        for key, run in runs.items():
            started = time.perf_counter_ns()
            jax.block_until_ready(run(step))
            if step >= 3:
                times[key].append((time.perf_counter_ns() - started) / 1e3)
    rows = sorted({rows for _, rows in runs})
    print(f"{'µs: best, median':18}" + "".join(f"{f'B={n}':>16}" for n in rows))
    for name in dict.fromkeys(name for name, _ in runs):
        cells = [(np.min(times[name, n]), np.median(times[name, n])) for n in rows]
        print(f"{name:18}" + "".join(f"{best:8.0f}{median:8.0f}" for best, median in cells))
    print(
        json.dumps(
            {
                "benchmark": "sampling",
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "vocab_size": options.vocab_size,
                "best_us": {
                    f"{name}/{n}": round(float(np.min(t)), 1) for (name, n), t in times.items()
                },
                "median_us": {
                    f"{name}/{n}": round(float(np.median(t)), 1) for (name, n), t in times.items()
                },
            }
        )
    )


if __name__ == "__main__":
    main()

"""Reference logits of the embedded model: transformers' in float32, from scripts/make_oracle.py."""

from __future__ import annotations

import numpy as np

from tests.models.loading import ORACLE

#: Of logits, max absolute.
TOLERANCE = 2e-3
#: Between the two largest logits: above it the greedy token must be the same.
MARGIN = 1e-2


class Oracle:
    """The stored arrays.

    Attributes:
        prompts: token ids.
        tokens: the greedy continuation of each prompt.
    """

    def __init__(self) -> None:
        self.arrays = dict(np.load(ORACLE / "smollm2" / "reference.npz"))
        ends = np.cumsum(self.arrays["prompt_lens"])
        self.prompts = [part.tolist() for part in np.split(self.arrays["prompt_tokens"], ends[:-1])]
        self.tokens = self.arrays["tokens"]

    def check(self, prompt: int, step: int, logits: np.ndarray) -> None:
        """The logits after `step` generated tokens."""
        arrays, at = self.arrays, (prompt, step)
        best, second = arrays["top_values"][at][:2]
        where = f"prompt {prompt}, step {step}"

        def near(ours: np.ndarray, theirs: np.ndarray) -> None:
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0, err_msg=where)

        near(logits[arrays["sampled_ids"]], arrays["sampled"][at])
        near(logits[arrays["top_ids"][at]], arrays["top_values"][at])
        wide = logits.astype(np.float64)
        near(np.log(np.sum(np.exp(wide - wide.max()))) + wide.max(), arrays["logsumexp"][at])
        if best - second > MARGIN:
            assert logits.argmax() == self.tokens[at], where
        for name in ("all_prefill", "all_last"):
            if tuple(arrays[f"{name}_at"]) == at:
                near(logits, arrays[name])

    def margin(self, prompt: int, step: int) -> float:
        """By how much the greedy token leads."""
        best, second = self.arrays["top_values"][prompt, step][:2]
        return float(best - second)

    def top_logprobs(self, prompt: int, step: int) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens, best first."""
        at = (prompt, step)
        values = self.arrays["top_values"][at] - self.arrays["logsumexp"][at]
        return dict(zip(self.arrays["top_ids"][at].tolist(), values.tolist(), strict=True))

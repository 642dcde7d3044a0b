"""transformers as a peer: batched forward passes with its own cache, greedy, no generate().

Arguments: GGUF FILE, THREADS, DTYPE (float32 or bfloat16).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from channel import Channel, Measured

channel = Channel()

import torch  # noqa: E402  # pyright: ignore[reportMissingImports]
import transformers  # noqa: E402


class TransformersPeer:
    """The model in eager mode."""

    def __init__(self, file: Path, num_threads: int, dtype: str) -> None:
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)
        self._about = (
            f"transformers {transformers.__version__}, torch {torch.__version__}, {dtype}, "
            f"{num_threads} threads"
        )
        transformers.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=getattr(torch, dtype),
            # Dense weights: packed ones would be another model's arithmetic.
            quantization_config=transformers.GgufConfig(dequantize=True),
        ).eval()

    def describe(self) -> str:
        """Versions, dtype and threads."""
        return self._about

    def decode(self, prompts: list[list[int]], steps: int) -> Measured:
        """One batch from beginning to end."""
        tokens, cache = self._forward(torch.tensor(prompts), None)
        outputs = [int(tokens[0])]
        start = time.perf_counter()
        for _ in range(steps):
            tokens, cache = self._forward(tokens[:, None], cache)
            outputs.append(int(tokens[0]))
        return time.perf_counter() - start, outputs

    def prefill(self, prompt: list[int]) -> Measured:
        """One forward pass, logits of the last position only."""
        start = time.perf_counter()
        tokens, _ = self._forward(torch.tensor([prompt]), None)
        return time.perf_counter() - start, [int(tokens[0])]

    def _forward(self, token_ids, cache):
        out = self._model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1), out.past_key_values


channel.serve(TransformersPeer(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))

"""vLLM on CPU as a peer, through its offline API.

Its engine does not tell when the first token came, so decoding is the difference of two runs: one
of `steps` + 1 tokens and one of 1.

Arguments: GGUF FILE, THREADS, DTYPE, MAX SEQUENCES, POSITIONS A SEQUENCE.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from channel import Channel, Measured

channel = Channel()
num_threads = int(sys.argv[2])
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{num_threads - 1}"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm  # noqa: E402  # pyright: ignore[reportMissingImports]
from save_dense import save_dense  # noqa: E402


class VllmPeer:
    """`vllm.LLM` without prefix caching, which would skip the prompts of later rounds."""

    def __init__(self, folder: str, dtype: str, max_rows: int, positions: int) -> None:
        self._about = f"vllm {vllm.__version__}, {dtype}, {num_threads} threads"
        self._llm = vllm.LLM(
            model=folder,
            dtype=dtype,
            max_num_seqs=max_rows,
            max_model_len=positions,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )

    def describe(self) -> str:
        """Version, dtype and threads."""
        return self._about

    def decode(self, prompts: list[list[int]], steps: int) -> Measured:
        """The longer run less the shorter one."""
        short, _ = self._generate(prompts, 1)
        long, outputs = self._generate(prompts, steps + 1)
        return long - short, outputs

    def prefill(self, prompt: list[int]) -> Measured:
        """A run of one token."""
        return self._generate([prompt], 1)

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> Measured:
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = self._llm.generate(inputs, sampling, use_tqdm=False)
        return time.perf_counter() - start, list(outputs[0].outputs[0].token_ids)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vllm-peer-") as model_folder:
        save_dense(Path(sys.argv[1]), model_folder)
        channel.serve(VllmPeer(model_folder, sys.argv[3], *map(int, sys.argv[4:6])))

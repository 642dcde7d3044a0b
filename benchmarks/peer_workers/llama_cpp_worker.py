"""llama.cpp as a peer, through llama-cpp-python's low-level API: one `llama_batch` a step.

Arguments: GGUF FILE, THREADS, MAX SEQUENCES, POSITIONS A SEQUENCE.
"""

from __future__ import annotations

import sys
import time

from channel import Channel, Measured

channel = Channel()

import llama_cpp as llama  # noqa: E402  # pyright: ignore[reportMissingImports]
import numpy as np  # noqa: E402

BATCH_TOKENS = 512


@llama.llama_log_callback
def quiet(level, text, user_data) -> None:
    """Takes llama.cpp's log; errors show as failed calls."""


class LlamaCppPeer:
    """A context with room for all sequences; the cache is cleared between measurements."""

    def __init__(self, file: str, num_threads: int, max_rows: int, positions: int) -> None:
        self._about = f"llama-cpp-python {llama.__version__}, {num_threads} threads"
        llama.llama_log_set(quiet, None)
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        self._model = llama.llama_model_load_from_file(file.encode(), parameters)
        if not self._model:
            sys.exit(f"llama.cpp cannot load {file}")
        vocab = llama.llama_model_get_vocab(self._model)
        self._vocab_size = llama.llama_vocab_n_tokens(vocab)
        options = llama.llama_context_default_params()
        options.n_ctx = max_rows * positions
        options.n_seq_max = max_rows
        options.n_batch = options.n_ubatch = BATCH_TOKENS
        options.n_threads = options.n_threads_batch = num_threads
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)

    def describe(self) -> str:
        """Version and threads."""
        return self._about

    def decode(self, prompts: list[list[int]], steps: int) -> Measured:
        """Prompts one by one, then all sequences in lockstep."""
        self._clear()
        tokens = [self._prompt(row, prompt) for row, prompt in enumerate(prompts)]
        outputs = [tokens[0]]
        start = time.perf_counter()
        for step in range(steps):
            entries = [
                (token, len(prompts[row]) + step, row, True) for row, token in enumerate(tokens)
            ]
            tokens = self._run(entries)
            outputs.append(tokens[0])
        return time.perf_counter() - start, outputs

    def prefill(self, prompt: list[int]) -> Measured:
        """The prompt in batches of `BATCH_TOKENS`."""
        self._clear()
        start = time.perf_counter()
        token = self._prompt(0, prompt)
        return time.perf_counter() - start, [token]

    def _clear(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)

    def _prompt(self, row: int, prompt: list[int]) -> int:
        entries = [(t, at, row, at == len(prompt) - 1) for at, t in enumerate(prompt)]
        last: list[int] = []
        for start in range(0, len(entries), BATCH_TOKENS):
            last = self._run(entries[start : start + BATCH_TOKENS])
        return last[0]

    def _run(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """A batch of (token, position, sequence, wants logits); greedy tokens of those that do."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, row, wants_logits) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = wants_logits
        if llama.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        chosen = []
        for index, entry in enumerate(entries):
            if entry[3]:
                logits = llama.llama_get_logits_ith(self._context, index)
                row_logits = np.ctypeslib.as_array(logits, shape=(self._vocab_size,))
                chosen.append(int(row_logits.argmax()))
        return chosen


channel.serve(LlamaCppPeer(sys.argv[1], *map(int, sys.argv[2:5])))

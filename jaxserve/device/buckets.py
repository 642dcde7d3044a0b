"""Which step programs exist: the shapes that steps are padded to, all compiled at start-up.

Rows in powers of two for decoding, with one and with several decode steps a call; a few sizes of
rows and tokens for steps with chunks; one that also returns prompt log-probabilities.

Invariant: at most MAX_PROGRAMS, and everything the scheduler may plan fits one of them.
"""

from __future__ import annotations

from jaxserve.config import SchedulerConfig
from jaxserve.device.step import Program

MAX_PROGRAMS = 24
#: Rows of the smaller mixed programs: what is being prefilled beside few decoding rows.
FEW_ROWS = 8
#: Token sizes of mixed programs grow by this.
TOKEN_FACTOR = 4
MIN_CHUNK_TOKENS = 32


class Buckets:
    """The programs of a configuration.

    Attributes:
        programs: all of them, smallest first.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._decode_steps = config.decode_steps
        self._max_rows = config.max_rows
        # A mixed program has more tokens than rows, so that its shape tells it from decoding.
        self._max_tokens = max(config.max_step_tokens, config.max_rows + 1)
        mixed = self._mixed()
        step_counts = sorted({1, config.decode_steps})
        rows = row_sizes(config.max_rows, (MAX_PROGRAMS - len(mixed)) // len(step_counts))
        decode = [
            Program(num_rows=n, num_tokens=n, decode_steps=steps)
            for steps in step_counts
            for n in rows
        ]
        self.programs = tuple(sorted((*decode, *mixed), key=_cost))
        assert len(self.programs) <= MAX_PROGRAMS

    def choose(
        self, num_rows: int, num_tokens: int, decode_steps: int = 1, prompt_logprobs: bool = False
    ) -> Program:
        """The smallest program that holds a step.

        Args:
            num_rows, num_tokens: live ones; equal where every row brings one token.

        Raises:
            ValueError: there is none, so the scheduler broke its budget.
        """
        for program in self.programs:
            if (
                program.num_rows >= num_rows
                and program.num_tokens >= num_tokens
                and program.decode_steps == decode_steps
                and program.prompt_logprobs == prompt_logprobs
                and (num_tokens == num_rows or not program.is_decode)
            ):
                return program
        raise ValueError(
            f"no program holds {num_rows} rows and {num_tokens} tokens with {decode_steps} decode "
            f"steps and prompt_logprobs={prompt_logprobs}; the limits are {self._max_rows} rows, "
            f"{self._max_tokens} tokens, {self._decode_steps} steps"
        )

    def _mixed(self) -> list[Program]:
        mixed = [
            Program(num_rows=self._max_rows, num_tokens=self._max_tokens),
            Program(num_rows=self._max_rows, num_tokens=self._max_tokens, prompt_logprobs=True),
        ]
        few = min(FEW_ROWS, self._max_rows)
        tokens = self._max_tokens
        for rows in sorted({few, self._max_rows}):
            tokens = self._max_tokens
            while tokens >= max(MIN_CHUNK_TOKENS, rows + 1):
                mixed.append(Program(num_rows=rows, num_tokens=tokens))
                tokens = -(-tokens // TOKEN_FACTOR)
        unique = sorted(set(mixed), key=_cost)
        return [p for p in unique if p.num_tokens > p.num_rows]


def row_sizes(max_rows: int, most: int) -> tuple[int, ...]:
    """At most `most` sizes up to max_rows, each a fixed multiple of the one before."""
    factor = 2
    while True:
        sizes, rows = [max_rows], 1
        while rows < max_rows:
            sizes.append(rows)
            rows *= factor
        if len(sizes) <= max(most, 1) or factor > max_rows:
            return tuple(sorted(sizes))[-max(most, 1) :]
        factor *= 2


def _cost(program: Program) -> tuple[int, int, int, bool]:
    return program.num_tokens, program.num_rows, program.decode_steps, program.prompt_logprobs

"""Which step programs exist: few shapes that every step is padded to, all compiled at start-up.

Four families, from the scheduler's limits. *Decode*: one token a row, row counts growing by a
factor (from 64 on at least fourfold); *several decode steps* in one call, at fewer row counts;
*mixed*: decoding rows and chunks, with a few rows (a lone prompt should not pay for max_rows of
sampling) or up to max_rows, and some token counts; one mixed program also returns prompt
log-probabilities; *verification* of drafts, for one row and for a few (`scheduler.draft_rows`).

Where there are LoRA adapters, each has a twin for steps in which some row uses one.

Invariant: at most MAX_PROGRAMS, twins not counted, and every step that the limits allow fits one
of them.
"""

from __future__ import annotations

from dataclasses import replace

from jaxserve.config import SchedulerConfig
from jaxserve.device.step import Program
from jaxserve.errors import ConfigError

MAX_PROGRAMS = 24
#: Rows of the mixed programs for few rows.
FEW_ROWS = 8
#: Token counts of mixed programs are the step's limit divided by these.
TOKEN_FRACTIONS = (1, 4, 16)
#: Row counts above this grow fourfold.
_FINE_ROWS = 64
_MIN_CHUNK_TOKENS = 16


class Buckets:
    """The step programs of one engine.

    Args:
        config: limits of a step.
        row_growth: from one decode program to the next, 2 or 4. Each program costs time and
            memory at start-up, padding costs time in each step: 4 where dead rows are nearly free.
        least_rows: of the smallest decode programs, 1 or 2.
        batch_invariant: one program of each kind, all of the largest size: sums over a row's own
            numbers are then taken in the same order whatever stands in the other rows.
        adapters: whether there are any; with batch_invariant all steps are then of the twins.

    Attributes:
        programs: all of them, ascending.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        row_growth: int = 2,
        least_rows: int = 1,
        *,
        batch_invariant: bool = False,
        adapters: bool = False,
    ) -> None:
        self.config = config
        self._twins_only = batch_invariant and adapters
        if batch_invariant:
            programs = _one_of_each(config)
        else:
            sizes = row_growth, min(least_rows, config.max_rows)
            decode, several = _decode(config, *sizes), _several_steps(config, *sizes)
            programs = [*decode, *several, *_mixed(config), *_verify(config)]
        assert len(set(programs)) <= MAX_PROGRAMS
        if adapters:
            twins = [replace(program, adapters=True) for program in programs]
            programs = twins if batch_invariant else [*programs, *twins]
        self.programs: tuple[Program, ...] = tuple(sorted(set(programs)))
        self._by_padding = sorted(self.programs, key=lambda p: (p.num_tokens, p.num_rows))

    def choose(
        self,
        num_rows: int,
        num_tokens: int,
        decode_steps: int = 1,
        prompt_logprobs: bool = False,
        drafts: bool = False,
        adapters: bool = False,
    ) -> Program:
        """The program with the least padding that holds a step.

        Args:
            num_rows: live rows; num_tokens: live tokens, at least one a row.
            drafts: whether some of the tokens are drafts to be verified.
            adapters: whether some row uses a LoRA adapter.

        Raises:
            ConfigError: nothing that was compiled holds it.
        """
        single = num_rows == num_tokens
        for program in self._by_padding:
            if (
                program.num_rows >= num_rows
                and program.num_tokens >= num_tokens
                and program.decode_steps == decode_steps
                and program.prompt_logprobs == prompt_logprobs
                and bool(program.draft_tokens) == drafts
                and program.adapters == (adapters or self._twins_only)
                and (single or not program.is_decode)
            ):
                return program
        raise ConfigError(
            f"no compiled program holds a step of {num_rows} rows, {num_tokens} tokens and "
            f"{decode_steps} decode steps{' with prompt_logprobs' if prompt_logprobs else ''}"
            f"{' with drafts' if drafts else ''}{' with adapters' if adapters else ''}: "
            f"scheduler.max_rows is {self.config.max_rows}, scheduler.max_step_tokens "
            f"{self.config.max_step_tokens}, scheduler.decode_steps {self.config.decode_steps}, "
            f"scheduler.draft_tokens {self.config.draft_tokens}"
        )


def _one_of_each(config: SchedulerConfig) -> list[Program]:
    rows, most = config.max_rows, max(config.max_step_tokens, config.max_rows + 1)
    return [
        Program(num_rows=rows, num_tokens=rows),
        Program(num_rows=rows, num_tokens=most),
        Program(num_rows=rows, num_tokens=most, prompt_logprobs=True),
    ]


def _decode(config: SchedulerConfig, row_growth: int, least_rows: int) -> list[Program]:
    sizes, size = {config.max_rows}, least_rows
    while size < config.max_rows:
        sizes.add(size)
        size *= row_growth if size < _FINE_ROWS else 4
    return [Program(num_rows=rows, num_tokens=rows) for rows in sizes]


def _several_steps(config: SchedulerConfig, row_growth: int, least_rows: int) -> list[Program]:
    if config.decode_steps == 1:
        return []
    sizes, size = {least_rows, config.max_rows}, 4 * row_growth // least_rows
    # Far up a program for more than half of all rows is left out: it would save little.
    while size < config.max_rows and (size <= _FINE_ROWS or 2 * size < config.max_rows):
        sizes.add(size)
        size *= 4
    return [
        Program(num_rows=rows, num_tokens=rows, decode_steps=config.decode_steps) for rows in sizes
    ]


def _mixed(config: SchedulerConfig) -> list[Program]:
    programs = []
    most = max(config.max_step_tokens, config.max_rows + 1)
    for rows in {min(FEW_ROWS, config.max_rows), config.max_rows}:
        sizes = {max(most // fraction, _MIN_CHUNK_TOKENS) for fraction in TOKEN_FRACTIONS}
        # Room for chunks behind so many decoding rows, or the program is never chosen.
        sizes = {min(size, most) for size in sizes if size >= 2 * rows} | {most}
        programs += [Program(num_rows=rows, num_tokens=size) for size in sizes]
    programs.append(Program(num_rows=config.max_rows, num_tokens=most, prompt_logprobs=True))
    return programs


def _verify(config: SchedulerConfig) -> list[Program]:
    drafts, most_rows = config.draft_tokens, config.max_verify_rows
    if not most_rows:
        return []
    return [
        Program(num_rows=rows, num_tokens=rows * (1 + drafts), draft_tokens=drafts)
        for rows in {1, most_rows}
    ]

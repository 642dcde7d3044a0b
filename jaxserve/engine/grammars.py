"""Requests whose output must match a grammar: compiled before they are let in, masked in each step.

A request waits here until its grammar is compiled, beside the step loop (`structured.compiler`); a
grammar that is wrong is that request's error. Then each of its sequences carries a `Constraint`,
and a step that samples for one is *masked*: the device runs the model, meanwhile the host reads the
tokens of the step before and makes the masks, and a second program samples by them. What a mask
takes is hidden behind the model, as long as it takes no longer.

The library that does the work is imported when the first client sends its vocabulary: a bare
accelerator image has none, and serves what is free of grammars.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Hashable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt

from jaxserve.config import StructuredConfig
from jaxserve.device.step import StepInputs
from jaxserve.engine.held import HeldRequests
from jaxserve.errors import ConfigError, GrammarError
from jaxserve.protocol.messages import Finished, Submit
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.slots import Owners
from jaxserve.types import FinishReason, Grammar, ModelInfo, Vocabulary

if TYPE_CHECKING:
    from jaxserve.structured.compiler import Build, Compiler
    from jaxserve.structured.masks import MaskedRow, MaskMaker

#: What a step may take to compile grammars anew for rows that another has spoiled theirs for.
_RENEWING_S = 0.05
#: Of each copy of the model, and whose rows cannot go on.
Masks = tuple[list[UInt[np.ndarray, "N W"]], list[tuple[Sequence, GrammarError]]]


class Grammars:
    """The grammars of one engine; see the module.

    Args:
        model: its vocabulary's size and end tokens.
        spares_cores: whether the model runs on this machine's cores: then masks are made by one
            thread where nothing else is configured.
    """

    def __init__(
        self, config: StructuredConfig, model: ModelInfo, *, spares_cores: bool = False
    ) -> None:
        self._config = config
        self._model = model
        self._mask_threads = config.mask_threads or (1 if spares_cores else os.cpu_count() or 1)
        self._held: HeldRequests[Submit] = HeldRequests("grammar")
        self._pending: dict[Grammar, Build] = {}
        self._compiler: Compiler | None = None
        self._maker: MaskMaker | None = None

    @property
    def num_held(self) -> int:
        """Sequences that wait for a grammar."""
        return self._held.num_sequences

    def use(self, vocabulary: Vocabulary) -> None:
        """A client says what tokens mean; all clients say the same.

        Raises:
            ConfigError: the library is not installed.
        """
        if self._compiler is not None:
            return
        try:
            from jaxserve.structured.compiler import Compiler
            from jaxserve.structured.masks import MaskMaker
        except ImportError as error:
            raise ConfigError(f"structured output needs llguidance: {error}") from error
        self._compiler = Compiler(self._config, self._model)
        self._compiler.use(vocabulary)
        self._maker = MaskMaker(self._mask_threads, self._model.vocab_size)

    # ------------------------------------------------------------------ before the scheduler

    def holds(self, client: Hashable, message: Submit) -> bool:
        """Whether a request has to wait for its grammar; it is kept then.

        Raises:
            GrammarError: the grammar is wrong.
        """
        grammar = message.sampling.grammar
        if grammar is None:
            return False
        build = self._build(grammar)
        if build.done:
            build.result()
            return False
        self._pending[grammar] = build
        self._held.add(client, message)
        return True

    def release(self) -> list[tuple[Hashable, Submit]]:
        """Requests whose grammar has been compiled, or found wrong; called each turn."""
        if not self._pending:
            return []
        wanted = {message.sampling.grammar for _, message in self._held}
        self._pending = {g: build for g, build in self._pending.items() if g in wanted}
        done = {grammar for grammar, build in self._pending.items() if build.done}
        return self._held.take(lambda message: message.sampling.grammar in done) if done else []

    def waits(self, request_keys: Collection[str]) -> bool:
        """Whether one of these requests waits here."""
        return self._held.has_any(request_keys)

    def withdraw(
        self, client: Hashable, sequence_ids: Collection[int], reason: FinishReason
    ) -> list[tuple[Submit, Finished]]:
        """As `HeldRequests.withdraw`."""
        return self._held.withdraw(client, sequence_ids, reason)

    def forget(self, client: Hashable) -> list[Submit]:
        """As `HeldRequests.forget`."""
        return self._held.forget(client)

    def constrain(
        self, message: Submit, sequences: Seq[Sequence]
    ) -> list[tuple[Sequence, GrammarError]]:
        """Gives the sequences of a request that was let in their constraints.

        Returns:
            Those whose output so far does not fit.
        """
        grammar = message.sampling.grammar
        if grammar is None:
            return []
        from jaxserve.structured.constraint import Constraint

        compiled, failed = self._build(grammar).result(), []
        for sequence in sequences:
            try:
                sequence.constraint = Constraint(
                    compiled,
                    message.sampling,
                    sequence.token_ids,
                    sequence.prompt_len,
                    self._model,
                )
            except GrammarError as error:
                failed.append((sequence, error))
                self._forget(grammar)
        return failed

    def _build(self, grammar: Grammar) -> Build:
        build = self._pending.get(grammar)
        if build is not None:
            return build
        if self._compiler is None:
            raise GrammarError("the client has sent no vocabulary to hold the output to a grammar")
        return self._compiler.start(grammar)

    def _forget(self, grammar: Grammar) -> None:
        """An output could not be held to it any further."""
        if self._compiler is not None:
            self._compiler.forget(grammar)

    # ------------------------------------------------------------------ in a step

    def masks(self, inputs: Seq[StepInputs], owners: Callable[[int], Owners]) -> Masks:
        """The masks of a launched step, now that all tokens before it are known.

        Args:
            inputs: of each copy of the model.
            owners: by copy, who holds which slot in the step.
        """
        assert self._maker is not None
        from jaxserve.structured.masks import MaskedRow

        masks, failed, renewing_s = [], [], _RENEWING_S
        for copy, own in enumerate(inputs):
            rows, sequences = [], []
            by_slot = owners(copy) if own.num_live_rows else []
            for row in np.flatnonzero(own.samples[: own.num_live_rows]).tolist():
                sequence = by_slot[own.rows[row]]
                if sequence is None or sequence.constraint is None or sequence.reason is not None:
                    continue
                draft: list[int] = []
                place = row
                if own.program.draft_tokens:
                    place, end = own.query_starts[row : row + 2].tolist()
                    draft = own.token_ids[place + 1 : end].tolist()
                rows.append(MaskedRow(sequence.constraint, place, draft))
                sequences.append(sequence)
            of_copy, wrong = self._maker.make(rows, own.program.num_places)
            masks.append(of_copy)
            for index, error in wrong:
                compiled = rows[index].constraint.compiled
                self._forget(compiled.grammar)
                renewing_s -= compiled.seconds
                if renewing_s < 0 or not self._renewed(rows[index], of_copy):
                    failed.append((sequences[index], error))
        return masks, failed

    def _renewed(self, row: MaskedRow, masks: UInt[np.ndarray, "N W"]) -> bool:
        """Whether a row can go on after all, by itself; then its masks are made.

        Another may have passed a limit that they share.
        """
        assert self._compiler is not None and self._maker is not None
        constraint = row.constraint
        if not constraint.matcher.ll.is_error():
            return False
        try:
            constraint.renew(self._compiler.renew(constraint.compiled))
        except GrammarError:
            return False
        return not self._maker.make_into(masks, [row])

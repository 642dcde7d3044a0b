"""What a request may have to wait for before the scheduler sees it.

It goes through three rooms, in this order, and is held in each as long as need be:

1. `Probation`: whether it is what ended the engine before is still to be found out.
2. `RequestAdapters`: its adapter is being loaded.
3. `Grammars`: its grammar is being compiled. This is the last room, so that what was compiled
   cannot be dropped again before the request is let in.

The loop asks each turn who is free to go. One that needs nothing passes through at once.

Invariant: from the second room on a request has a claim on its adapter. Whoever leaves the lobby
without being free to go has none any more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from collections.abc import Sequence as Seq

from jaxserve.engine.adapters import RequestAdapters
from jaxserve.engine.check import check_submit, request_number
from jaxserve.engine.grammars import Grammars
from jaxserve.engine.probation import Probation
from jaxserve.engine.recorder import Recorder
from jaxserve.errors import JaxserveError
from jaxserve.protocol.messages import Embed, Finished, Submit
from jaxserve.scheduler.sequence import Sequence
from jaxserve.types import FinishReason, ModelInfo

#: A client's request that waits no more: refused with the error, or free to go where there is none.
Released = tuple[Hashable, Submit | Embed, JaxserveError | None]


class Lobby:
    """The rooms, one behind the other.

    Args:
        model: requests are checked against it before their grammars are compiled.
        probation, adapters, grammars: the rooms.
        recorder: told what is being taken in.
    """

    def __init__(
        self,
        model: ModelInfo,
        probation: Probation,
        adapters: RequestAdapters,
        grammars: Grammars,
        recorder: Recorder,
    ) -> None:
        self._model = model
        self._probation = probation
        self._adapters = adapters
        self._grammars = grammars
        self._recorder = recorder

    @property
    def num_held(self) -> int:
        """Sequences that wait here."""
        return self._probation.num_held + self._adapters.num_held + self._grammars.num_held

    @property
    def is_loading(self) -> bool:
        """Whether the loop has to look here again soon, though no message comes."""
        return self._adapters.is_loading or self._grammars.num_held > 0

    def holds(self, client: Hashable, message: Submit | Embed) -> bool:
        """Whether a request has to wait; it is kept then. If not, it is free to go.

        Raises:
            JaxserveError: it is refused.
        """
        self._probation.check(message)
        return self._probation.holds(client, message) or self._lacks_adapter(client, message)

    def release(self) -> list[Released]:
        """Requests that waited and wait no more; called each turn of the loop."""
        released: list[Released] = []
        for client, message in self._probation.release(self._waits):
            released += _pass(self._lacks_adapter, client, message)
        for (client, submit), error in self._adapters.release():
            if error is None:
                released += _pass(self._lacks_grammar, client, submit)
            else:
                self._adapters.refused(submit)
                released.append((client, submit, error))
        for client, submit in self._grammars.release():
            released += _pass(self._lacks_grammar, client, submit)
        return released

    def let_in(self, message: Submit | Embed, sequences: Seq[Sequence]) -> None:
        """One that was free to go was let in as these sequences."""
        self._probation.watch(message, sequences)

    def refused(self, message: Submit | Embed) -> None:
        """One that was free to go is not let in."""
        self._adapters.refused(message)

    def withdraw(
        self, client: Hashable, sequence_ids: Collection[int], reason: FinishReason
    ) -> list[Finished]:
        """A client cancels these: the ends of those of them that wait here."""
        ends = self._probation.withdraw(client, sequence_ids, reason)
        ends += self._adapters.withdraw(client, sequence_ids, reason)
        for message, end in self._grammars.withdraw(client, sequence_ids, reason):
            self._adapters.withdrawn(message)
            ends.append(end)
        return ends

    def forget(self, client: Hashable) -> None:
        """A client is gone."""
        self._probation.forget(client)
        self._adapters.forget(client)
        for message in self._grammars.forget(client):
            self._adapters.refused(message)

    def _waits(self, request_keys: Collection[str]) -> bool:
        """Whether one of these requests is in the second room or the third."""
        return self._adapters.waits(request_keys) or self._grammars.waits(request_keys)

    def _lacks_adapter(self, client: Hashable, message: Submit | Embed) -> bool:
        """Has a request wait in the second room or the third."""
        if isinstance(message, Embed):
            return False
        return self._adapters.holds(client, message) or self._lacks_grammar(client, message)

    def _lacks_grammar(self, client: Hashable, message: Submit) -> bool:
        """Has a request wait in the third room; nothing is compiled for one that is wrong."""
        if message.sampling.grammar is None:
            return False
        try:
            self._recorder.arriving(request_number(message.request_key))
            check_submit(message, self._model)
            lacks = self._grammars.holds(client, message)
        except JaxserveError:
            self._recorder.arriving(0)
            self._adapters.refused(message)
            raise
        self._recorder.arriving(0)
        return lacks


def _pass[Request: Submit | Embed](
    lacks: Callable[[Hashable, Request], bool], client: Hashable, message: Request
) -> list[Released]:
    """One that has left a room: free, refused, or nothing where it waits in the next."""
    try:
        return [] if lacks(client, message) else [(client, message, None)]
    except JaxserveError as error:
        return [(client, message, error)]

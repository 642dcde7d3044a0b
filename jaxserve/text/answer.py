"""The answer to an offline request, from the engine's events to text.

`Answer` is what a caller without an event loop holds of one request; several may be open on one
`SyncClient`. The HTTP front end has its own (`http.generation`), which streams all choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.protocol.client import SequenceEvent, SyncClient
from jaxserve.protocol.messages import AdapterRef
from jaxserve.text.choice import ChoiceText
from jaxserve.text.message import Call, Part, Text, gather, joined
from jaxserve.text.read_choice import ReadChoice
from jaxserve.text.request import PlannedRequest
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import FinishReason, TokenLogprobs


@dataclass(kw_only=True)
class Choice:
    """One of a request's n outputs.

    Attributes:
        text: all of it; of a message that is read, the words alone.
        reasoning: before the answer; None where there is none.
        calls: of tools.
        token_ids: those that belong to the output (the end token is not among them).
        logprobs: one entry per token, if asked for.
        finish_reason: "stop" (end token or stop string), "length", or "tool_calls" where the
            message is whole calls.
    """

    text: str = ""
    reasoning: str | None = None
    calls: list[Call] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(kw_only=True)
class Generation:
    """The answer to one request; text, calls, token_ids and finish_reason are its first choice's.

    Attributes:
        prompt: as it was given, or as the chat template wrote it; None for token ids.
        prompt_logprobs: of prompt tokens after the first, if asked for.
        cached_tokens: prompt tokens whose KV was found instead of computed.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def calls(self) -> list[Call]:
        return self.choices[0].calls

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a streamed answer.

    Attributes:
        text: as of `Choice`: of a message that is read, its words.
        parts: of such a message, all that is new of it.
        finish_reason: set in the last.
    """

    text: str
    token_ids: list[int]
    finish_reason: str = ""
    parts: Sequence[Part] = ()


class _Progress:
    """One choice of a request, as far as it has come."""

    def __init__(self, read: ReadChoice) -> None:
        self.read = read
        self.texts: list[str] = []
        self.parts: list[Part] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason = ""


class Answer:
    """One request at the engine, and what has come of it.

    Args:
        adapter: a LoRA adapter; None for the base model.
        on_end: is called once, when the engine has no more to do with it.

    Attributes:
        n: sequences it has there.
        error: why it failed, once it has.
    """

    def __init__(
        self,
        client: SyncClient,
        tokenizer: Tokenizer,
        planned: PlannedRequest,
        adapter: AdapterRef | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        request = planned.request
        self.n = request.n
        self.error: JaxserveError | None = None
        self._planned = planned
        self._on_end = on_end
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._cached_tokens = 0
        self._streamed = (0, 0, 0)  # texts, parts and tokens of the first choice, handed out
        self._choices = [
            _Progress(
                ReadChoice(
                    ChoiceText(
                        tokenizer,
                        planned.token_ids,
                        stop=request.stops,
                        include_stop=request.include_stop,
                        skip_special_tokens=request.skip_special_tokens,
                        shown=planned.shown_tokens,
                    ),
                    planned.reader() if planned.reader is not None else None,
                )
            )
            for _ in range(request.n)
        ]
        self._stream = client.submit(
            planned.token_ids,
            planned.sampling,
            n=request.n,
            cache_salt=request.cache_salt,
            adapter=adapter,
        )

    def advance(self) -> bool:
        """Takes in what has come; whether the request is done.

        Raises:
            DeviceFailure: the engine failed.
        """
        try:
            while (event := self._stream.take()) is not None:
                self._add(self._choices[event.choice], event)
        except DeviceFailure:
            raise
        except JaxserveError as error:
            self.error = error
        return self.error is not None or all(choice.finish_reason for choice in self._choices)

    def take_piece(self) -> Piece | None:
        """What is new of the first choice since the last call; None if nothing is."""
        choice = self._choices[0]
        now = len(choice.texts), len(choice.parts), len(choice.token_ids)
        if now == self._streamed and not choice.finish_reason:
            return None
        (texts, parts, tokens), self._streamed = self._streamed, now
        text, new = "".join(choice.texts[texts:]), joined(choice.parts[parts:])
        if self._planned.reader is not None:
            text = "".join(part.text for part in new if isinstance(part, Text))
        return Piece(
            text=text,
            token_ids=choice.token_ids[tokens:],
            finish_reason=choice.finish_reason,
            parts=new,
        )

    def result(self) -> Generation | JaxserveError:
        """The whole answer, once `advance` has said that it is done."""
        if self.error is not None:
            return self.error
        return Generation(
            prompt=self._planned.text,
            prompt_token_ids=self._planned.token_ids,
            choices=list(map(self._choice, self._choices)),
            prompt_logprobs=self._prompt_logprobs,
            cached_tokens=self._cached_tokens,
        )

    def cancel(self) -> None:
        """Ends what still runs at the engine."""
        self._stream.cancel()
        on_end, self._on_end = self._on_end, lambda: None
        on_end()

    def _choice(self, progress: _Progress) -> Choice:
        choice = Choice(
            text="".join(progress.texts),
            token_ids=progress.token_ids,
            logprobs=progress.logprobs,
            finish_reason=progress.finish_reason,
        )
        if self._planned.reader is not None:
            message = gather(progress.parts)
            choice.text, choice.reasoning = message.text, message.reasoning
            choice.calls = message.calls
        return choice

    def _add(self, choice: _Progress, event: SequenceEvent) -> None:
        self._prompt_logprobs += event.prompt_logprobs
        finished = event.finished
        if finished is not None and event.choice == 0:
            self._cached_tokens = finished.record.cached_tokens
        if choice.finish_reason:
            return  # it is over here; what comes until the cancel arrives is dropped
        delta = choice.read.add(event.token_ids)
        choice.texts.append(delta.text)
        choice.token_ids += event.token_ids[: delta.num_tokens]
        choice.logprobs += event.logprobs[: delta.num_tokens]
        parts, part_tokens, reason = [*delta.parts], [*delta.part_tokens], ""
        if delta.stopped:
            reason = FinishReason.STOP.value
            self._stream.cancel(event.choice, FinishReason.STOP)
        elif finished is not None:
            tail = choice.read.finish()
            choice.texts.append(tail.text)
            parts += tail.parts
            part_tokens += tail.part_tokens
            reason = finished.reason.value
        if reason:
            parts, _, choice.finish_reason = choice.read.close(parts, part_tokens, reason)
        choice.parts += parts

"""The answer to an offline request, from the engine's events to text.

`Answer` is what a caller without an event loop holds of one request; several may be open on one
`SyncClient`. The HTTP front end has its own (`http.generation`), which streams all choices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxserve.errors import DeviceFailure, JaxserveError
from jaxserve.protocol.client import SequenceEvent, SyncClient
from jaxserve.text.choice import ChoiceText
from jaxserve.text.request import PlannedRequest
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import FinishReason, TokenLogprobs


@dataclass(kw_only=True)
class Choice:
    """One of a request's n outputs.

    Attributes:
        token_ids: those that belong to the output (the end token is not among them).
        logprobs: one entry per token, if asked for.
        finish_reason: "stop" (end token or stop string) or "length".
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(kw_only=True)
class Generation:
    """The answer to one request; text, token_ids and finish_reason are its first choice's.

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
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a streamed answer; finish_reason is set in the last."""

    text: str
    token_ids: list[int]
    finish_reason: str = ""


class _Part:
    """One choice of a request, as far as it has come."""

    def __init__(self, text: ChoiceText) -> None:
        self.text = text
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason = ""


class Answer:
    """One request at the engine, and what has come of it.

    Attributes:
        n: sequences it has there.
        error: why it failed, once it has.
    """

    def __init__(self, client: SyncClient, tokenizer: Tokenizer, planned: PlannedRequest) -> None:
        request = planned.request
        self.n = request.n
        self.error: JaxserveError | None = None
        self._planned = planned
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._cached_tokens = 0
        self._streamed = (0, 0)  # texts and tokens of the first choice that were handed out
        self._parts = [
            _Part(
                ChoiceText(
                    tokenizer,
                    planned.token_ids,
                    stop=request.stops,
                    include_stop=request.include_stop,
                    skip_special_tokens=request.skip_special_tokens,
                )
            )
            for _ in range(request.n)
        ]
        self._stream = client.submit(
            planned.token_ids, planned.sampling, n=request.n, cache_salt=request.cache_salt
        )

    def advance(self) -> bool:
        """Takes in what has come; whether the request is done.

        Raises:
            DeviceFailure: the engine failed.
        """
        try:
            while (event := self._stream.take()) is not None:
                self._add(self._parts[event.choice], event)
        except DeviceFailure:
            raise
        except JaxserveError as error:
            self.error = error
        return self.error is not None or all(part.finish_reason for part in self._parts)

    def take_piece(self) -> Piece | None:
        """What is new of the first choice since the last call; None if nothing is."""
        part = self._parts[0]
        texts, tokens = self._streamed
        if len(part.texts) == texts and len(part.token_ids) == tokens and not part.finish_reason:
            return None
        self._streamed = len(part.texts), len(part.token_ids)
        return Piece(
            text="".join(part.texts[texts:]),
            token_ids=part.token_ids[tokens:],
            finish_reason=part.finish_reason,
        )

    def result(self) -> Generation | JaxserveError:
        """The whole answer, once `advance` has said that it is done."""
        if self.error is not None:
            return self.error
        return Generation(
            prompt=self._planned.text,
            prompt_token_ids=self._planned.token_ids,
            choices=[
                Choice(
                    text="".join(part.texts),
                    token_ids=part.token_ids,
                    logprobs=part.logprobs,
                    finish_reason=part.finish_reason,
                )
                for part in self._parts
            ],
            prompt_logprobs=self._prompt_logprobs,
            cached_tokens=self._cached_tokens,
        )

    def cancel(self) -> None:
        """Ends what still runs at the engine."""
        self._stream.cancel()

    def _add(self, part: _Part, event: SequenceEvent) -> None:
        self._prompt_logprobs += event.prompt_logprobs
        finished = event.finished
        if finished is not None and event.choice == 0:
            self._cached_tokens = finished.record.cached_tokens
        if part.finish_reason:
            return  # a stop string matched; what comes until the cancel arrives is dropped
        delta = part.text.add(event.token_ids)
        part.texts.append(delta.text)
        part.token_ids += event.token_ids[: delta.num_tokens]
        part.logprobs += event.logprobs[: delta.num_tokens]
        if delta.stopped:
            part.finish_reason = FinishReason.STOP.value
            self._stream.cancel(event.choice, FinishReason.STOP)
        elif finished is not None:
            part.texts.append(part.text.finish().text)
            part.finish_reason = finished.reason.value

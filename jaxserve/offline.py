"""Offline use: a model in this process, without HTTP.

    from jaxserve import LLM

    with LLM() as llm:                                  # the embedded SmolLM2-135M-Instruct
        for answer in llm.generate(["The sea is", "Once upon a time"], max_tokens=32):
            print(answer.text)
        print(llm.chat([{"role": "user", "content": "What is gravity?"}]).text)
        for piece in llm.stream("One, two,", temperature=0):
            print(piece.text, end="", flush=True)

    with LLM(embeddings__model="minilm") as llm:        # and all-MiniLM-L6-v2 beside it
        vectors = llm.embed(["The sea is wide.", "Der Himmel ist weit."])

The engine is the server's own, turning in a thread (`engine.thread`); `LLM` is its client: it
tokenizes, keeps a window of sequences running, and turns tokens into text with `text.choice`.

Invariants: an `LLM` is used by one thread. Every request gets exactly one result, in any order;
what a request does wrong is its own typed error and harms no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from jaxserve.config import Config
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import ConfigError, InvalidRequest, JaxserveError
from jaxserve.protocol.client import SyncClient, SyncStream
from jaxserve.settings import load_config
from jaxserve.text.answer import Answer, Choice, Generation, Piece
from jaxserve.text.embedding import groups_of, load_embedding_text
from jaxserve.text.request import PlannedRequest, Request, make_request, plan
from jaxserve.text.template import ChatTemplate, load_chat_template
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.vocabulary import vocabulary_of
from jaxserve.types import EmbeddingInfo, EmbeddingParams, ModelInfo

__all__ = ["LLM", "Choice", "Generation", "Piece", "Request"]

Message = Mapping[str, Any]


class LLM:
    """A model, loaded and compiled, ready to generate.

    Args:
        path: the embedded default, a directory, a .gguf file, a hub id, a gs:// or s3:// address.
        config: all settings, instead of the environment's; `path` then comes from it.
        show_progress: bars for loading, compiling and batches; None shows them on a terminal.
        overrides: settings by key ("max_rows=8", "max_context=1024"), with the section in front
            where several have the key ("weights__dtype='bfloat16'").

    Raises:
        ConfigError: an unknown or wrong setting.
        WeightsError: the model cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "smollm2-135m-instruct",
        *,
        config: Config | None = None,
        show_progress: bool | None = None,
        **overrides: object,
    ) -> None:
        if config is None:
            settings = [f"model.path={os.fspath(path)}"]
            settings += [
                f"{_setting_path(name)}={_setting_text(value)}" for name, value in overrides.items()
            ]
            config = load_config(settings=settings)
        from jaxserve.engine.load import load_parts  # JAX, once the settings are right
        from jaxserve.weights.sources import resolve, resolve_encoder

        with _Bars(show_progress) as bars:
            found = resolve(config.model, config.weights, bars.show)
            name = config.model.served_name or config.model.path
            config = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, path=str(found), served_name=name),
                embeddings=resolve_encoder(config, bars.show),
                # Nobody observes: steps need not be divided over requests.
                telemetry=dataclasses.replace(config.telemetry, enabled=False),
            )
            tokenizer = load_tokenizer(found, config.model.tokenizer)
            template = load_chat_template(found, config.model.chat_template)
            engine = EngineThread(config, load_parts, bars.show)
        self._begin(engine, config, tokenizer, template, show_progress)

    @classmethod
    def over(
        cls,
        engine: EngineThread,
        config: Config,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        show_progress: bool | None = False,
    ) -> Self:
        """An `LLM` over an engine that runs already; closing it closes the engine."""
        llm = cls.__new__(cls)
        llm._begin(engine, config, tokenizer, template, show_progress)
        return llm

    def _begin(
        self,
        engine: EngineThread,
        config: Config,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        show_progress: bool | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._embedding_text = load_embedding_text(config.embeddings, tokenizer)
        self._engine = engine
        self._config = config
        self._bars = show_progress
        #: Sequences at the engine at once: enough that none of its rows waits for us.
        self._window = max(1, min(2 * config.scheduler.max_rows, config.scheduler.max_waiting))
        self._client = SyncClient(
            engine.connect(),
            silence_s=config.engine.step_timeout_s + 30.0,
            vocabulary=lambda: vocabulary_of(tokenizer),
        )
        self._cuts = config.embeddings.over_length == "truncate"
        self._client.start()
        status = self._client.ready()
        assert status.model is not None, "a ready engine has a model"
        self.model: ModelInfo = status.model
        self.embedding_model: EmbeddingInfo | None = status.embedding

    # ------------------------------------------------------------------------ asking

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        **options: Any,
    ) -> list[Generation]:
        """Continues prompts, all in one batch.

        Args:
            prompts: one text, one list of token ids, or a list of either.
            options: of `Request`, the same for all prompts: max_tokens (256), temperature (1.0),
                stop, n, seed, logprobs, …

        Returns:
            One generation a prompt, in their order.

        Raises:
            InvalidRequest, ContextTooLong: a prompt or option is wrong; nothing was generated.
            DeviceFailure: the engine failed.
        """
        return self._all([make_request(prompt=prompt, **options) for prompt in _listed(prompts)])

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any
    ) -> list[Generation]:
        """The assistant's next message of a conversation, or of each of several.

        Args:
            messages: {"role": …, "content": …} each, oldest first; or a list of such lists.
            options: as in `generate`; `template` holds further variables of the chat template.

        Returns:
            One generation a conversation, in their order.

        Raises:
            InvalidRequest: also when the model has no chat template. Else as `generate`.
        """
        conversations: Any = [messages] if _is_conversation(messages) else messages
        return self._all([make_request(messages=each, **options) for each in conversations])

    def stream(
        self, prompt: str | Sequence[int] | Sequence[Message], **options: Any
    ) -> Generator[Piece]:
        """One answer, piece by piece. Leaving the loop early (or closing it) ends the sequence.

        Args:
            prompt: a text, token ids, or a conversation's messages.
            options: as in `generate`, with n = 1.

        Raises:
            as `generate`: at once, or from the iteration.
        """
        kind = "messages" if _is_conversation(prompt) else "prompt"
        request = make_request(**{kind: prompt}, **options)
        if request.n != 1:
            raise InvalidRequest(f"a stream has one choice, got n = {request.n}", param="n")
        return self._pieces(Answer(self._client, self.tokenizer, self.plan(request)))

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        dimensions: int = 0,
    ) -> Float32[np.ndarray, "R D"]:
        """The vectors of texts, by the model that `embeddings.model` names.

        Texts that are too long are cut where `embeddings.over_length` is "truncate".

        Args:
            prompt_name: of the model's prompt to put before them; its default one where None.
            pooling, normalize: as the model has it where None.
            dimensions: of the vectors; 0 keeps all.

        Raises:
            ConfigError: no model embeds here.
            InvalidRequest, ContextTooLong: an argument or a text is wrong.
            EmbeddingNotFinite: the model gave no vector for a text.
            DeviceFailure: the engine failed.
        """
        text, model = self._embedding_text, self.embedding_model
        if text is None or model is None:
            raise ConfigError('no model embeds here: LLM(embeddings__model="minilm"), for one')
        prefix = text.prefix(prompt_name)
        listed = [prefix + each for each in ([texts] if isinstance(texts, str) else texts)]
        if not listed:
            return np.empty((0, dimensions or model.dimensions), np.float32)
        params = EmbeddingParams(
            pooling=model.pooling if pooling is None else pooling,
            normalize=model.normalize if normalize is None else normalize,
            dimensions=dimensions,
        )
        cut = model.max_length if self._cuts else None
        tokens = text.tokenizer.encode(listed, cut)
        found: list[bytes] = [b""] * len(tokens)
        groups = groups_of(tokens, model.group)
        running: deque[tuple[list[int], SyncStream]] = deque()
        while groups or running:
            if groups:
                group = groups.popleft()
                stream = self._client.embed([tokens[place].ids for place in group], params)
                running.append((group, stream))
            if len(running) > 1 or not groups:  # the engine has the next group already
                group, stream = running.popleft()
                for event in stream:
                    if event.finished is not None:
                        found[group[event.choice]] = event.finished.vector
        return np.frombuffer(b"".join(found), np.float32).reshape(len(found), -1)

    def run(self, requests: Iterable[Request]) -> Generator[tuple[int, Generation | JaxserveError]]:
        """Results of any number of requests as they are done, each with its request's index.

        Requests are taken from the iterable as room is made for them. A request's own error is
        its result; only an engine that has failed ends the iteration, by raising.
        """
        running: dict[int, Answer] = {}
        try:
            for index, request in enumerate(requests):
                try:
                    planned = self.plan(request)
                except InvalidRequest as error:
                    yield index, error
                    continue
                while running and not self._has_room(running, request.n):
                    yield from self._finished(running)
                running[index] = Answer(self._client, self.tokenizer, planned)
            while running:
                yield from self._finished(running)
        finally:
            for answer in running.values():
                answer.cancel()

    # ------------------------------------------------------------------------ life

    def close(self) -> None:
        """Ends the engine; the LLM cannot be used any more."""
        self._client.close()
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def plan(self, request: Request) -> PlannedRequest:
        """A request checked and tokenized, without running it.

        Raises:
            InvalidRequest, ContextTooLong: what is wrong with it.
        """
        return plan(request, self.tokenizer, self.template, self.model)

    def _has_room(self, running: Mapping[int, Answer], n: int) -> bool:
        return sum(answer.n for answer in running.values()) + n <= self._window

    def _finished(
        self, running: dict[int, Answer]
    ) -> Iterator[tuple[int, Generation | JaxserveError]]:
        """Takes out what is done; where nothing is, takes in what the engine sends next."""
        done = [index for index, answer in running.items() if answer.advance()]
        for index in done:
            yield index, running.pop(index).result()
        if not done:
            self._client.wait()

    def _all(self, requests: list[Request]) -> list[Generation]:
        for request in requests:
            self.plan(request)  # all are right before any is run
        results: list[Generation | None] = [None] * len(requests)
        num_tokens = 0
        bar = tqdm(total=len(requests), unit="prompt", leave=False, disable=_disable(self._bars))
        with bar, contextlib.closing(self.run(requests)) as answers:
            for index, answer in answers:
                if isinstance(answer, JaxserveError):
                    raise answer
                results[index] = answer
                num_tokens += sum(len(choice.token_ids) for choice in answer.choices)
                bar.set_postfix(tokens=num_tokens, refresh=False)
                bar.update()
        return [result for result in results if result is not None]

    def _pieces(self, answer: Answer) -> Generator[Piece]:
        try:
            done = False
            while not done:
                done = answer.advance()
                piece = answer.take_piece()
                if piece is not None:
                    yield piece
                elif not done:
                    self._client.wait()
            if answer.error is not None:
                raise answer.error
        finally:
            answer.cancel()


class _Bars:
    """Bars of start-up, one a phase; as a context manager, so that none is left open."""

    def __init__(self, shown: bool | None) -> None:
        self._disable = _disable(shown)
        self._phase = ""
        self._bar: tqdm[Any] | None = None

    def show(self, phase: str, done: int, total: int) -> None:
        """How far a phase is; sizes over a million are bytes."""
        if phase != self._phase:
            self.close()
            self._phase = phase
            in_bytes = total > 1_000_000
            self._bar = tqdm(
                total=total,
                desc=phase,
                unit="B" if in_bytes else "",
                unit_scale=in_bytes,
                disable=self._disable,
                leave=False,
            )
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _disable(shown: bool | None) -> bool | None:
    """tqdm's argument: None has it ask whether stderr is a terminal."""
    return None if shown is None else not shown


def _listed(prompts: Any) -> list[Any]:
    """A batch: one prompt is a batch of one, and so is what cannot be any."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and isinstance(listed[0], Integral) else listed


def _is_conversation(value: Any) -> bool:
    return (
        not isinstance(value, str | Mapping)
        and isinstance(value, Sequence)
        and len(value) > 0
        and isinstance(value[0], Mapping)
    )


def _setting_path(name: str) -> str:
    """The configuration key that a keyword argument means.

    Raises:
        ConfigError: several sections have it.
    """
    if "__" in name:
        return name.replace("__", ".", 1)
    sections = [
        section.name
        for section in dataclasses.fields(Config)
        if any(key.name == name for key in dataclasses.fields(getattr(Config(), section.name)))
    ]
    if len(sections) > 1:
        choices = " or ".join(f"{section}__{name}" for section in sections)
        raise ConfigError(f"{name!r} is a key of several sections; write {choices}")
    return f"{sections[0]}.{name}" if sections else name


def _setting_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)

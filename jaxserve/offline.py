"""Offline use: a model in this process, without HTTP.

    from jaxserve import LLM

    with LLM() as llm:                                  # the embedded SmolLM2-135M-Instruct
        for answer in llm.generate(["The sea is", "Once upon a time"], max_tokens=32):
            print(answer.text)
        (answer,) = llm.chat([{"role": "user", "content": "What is gravity?"}])
        print(answer.text)
        for piece in llm.stream("One, two,", temperature=0):
            print(piece.text, end="", flush=True)

    with LLM(lora__enabled=True) as llm:                # an adapter in peft's format
        (answer,) = llm.chat(messages, adapter="my-adapter", tools=tools)
        print(answer.text, answer.calls)

    with LLM(embeddings__model="minilm") as llm:        # and all-MiniLM-L6-v2 beside it
        vectors = llm.embed(["The sea is wide.", "Der Himmel ist weit."])

The engine is the server's own, turning in a thread (`engine.thread`); `LLM` is its client: it
tokenizes, keeps a window of sequences running, and turns tokens into text and messages with
`text.read_choice`.

Invariants: an `LLM` is used by one thread. Every request gets exactly one result, in any order;
what a request does wrong is its own typed error and harms no other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from jaxserve.bars import StartupBars, hidden
from jaxserve.config import Config
from jaxserve.engine.thread import EngineThread
from jaxserve.errors import ConfigError, DeviceFailure, InvalidRequest, JaxserveError
from jaxserve.lora.local import Copy, LocalAdapters
from jaxserve.protocol.client import SyncClient
from jaxserve.protocol.messages import AdapterRef
from jaxserve.settings import load_config, settings_of
from jaxserve.text.answer import Answer, Choice, Generation, Piece
from jaxserve.text.batch import is_conversation, listed, requests_of
from jaxserve.text.dialect import make_dialect
from jaxserve.text.embedding import load_embedding_text
from jaxserve.text.request import PlannedRequest, Request, make_request, plan
from jaxserve.text.template import ChatTemplate, load_chat_template
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.trial import Trial
from jaxserve.text.vectors import vectors_of
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

    Attributes:
        config: the settings, with the paths that were found.

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
            settings += settings_of(overrides)
            config = load_config(settings=settings)
        from jaxserve.engine.load import load_parts  # JAX, once the settings are right
        from jaxserve.weights.sources import resolve, resolve_encoder

        with StartupBars(show_progress) as bars:
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
        self._dialect = make_dialect(template, tokenizer, config.tools)
        self._embedding_text = load_embedding_text(config.embeddings, tokenizer)
        self._engine = engine
        self.config = config
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
        self._trial = Trial(
            config.structured, status.model, vocabulary=lambda: vocabulary_of(tokenizer)
        )
        base = status.model.adapters
        self._adapters = None if base is None else LocalAdapters(config.lora, base)

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
                stop, n, seed, logprobs, grammar, adapter, …; of `adapter` also a list of one for
                each prompt, None for the base model.

        Returns:
            One generation a prompt, in their order.

        Raises:
            InvalidRequest, ContextTooLong: a prompt or option is wrong; nothing was generated.
            AdapterNotFound: there is no such adapter.
            DeviceFailure: the engine failed.
        """
        return self._all(requests_of("prompt", listed(prompts), options))

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], **options: Any
    ) -> list[Generation]:
        """The assistant's next message of a conversation, or of each of several.

        Args:
            messages: {"role": …, "content": …} each, oldest first, as OpenAI's chat has them; or a
                list of such lists.
            options: as in `generate`; also tools, tool_choice, parallel_tool_calls and
                response_format, as OpenAI's chat has them; `template` holds further variables of
                the chat template.

        Returns:
            One generation a conversation, in their order.

        Raises:
            InvalidRequest: also when the model has no chat template. Else as `generate`.
        """
        conversations: Any = [messages] if is_conversation(messages) else messages
        return self._all(requests_of("messages", list(conversations), options))

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
        kind = "messages" if is_conversation(prompt) else "prompt"
        request = make_request(**{kind: prompt}, **options)
        if request.n != 1:
            raise InvalidRequest(f"a stream has one choice, got n = {request.n}", param="n")
        return self._pieces(self._ask(self.plan(request)))

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
        whole = [prefix + each for each in ([texts] if isinstance(texts, str) else texts)]
        if not whole:
            return np.empty((0, dimensions or model.dimensions), np.float32)
        params = EmbeddingParams(
            pooling=model.pooling if pooling is None else pooling,
            normalize=model.normalize if normalize is None else normalize,
            dimensions=dimensions,
        )
        cut = model.max_length if self._cuts else None
        tokens = text.tokenizer.encode(whole, cut)
        return vectors_of(self._client, tokens, params, model.group)

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
                    while running and not self._has_room(running, request.n):
                        yield from self._finished(running)
                    running[index] = self._ask(planned)
                except DeviceFailure:
                    raise
                except JaxserveError as error:
                    yield index, error
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
        if self._adapters is not None:
            self._adapters.close()

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
            InvalidRequest, ContextTooLong, AdapterNotFound: what is wrong with it.
        """
        planned = plan(
            request, self.tokenizer, self.template, self.model, self._dialect, self._trial.check
        )
        if request.adapter is not None:
            adapters = self._with_adapters()
            adapters.release(adapters.hold(request.adapter))
        return planned

    def _ask(self, planned: PlannedRequest) -> Answer:
        """Sends a request to the engine."""
        adapter = planned.request.adapter
        if adapter is None:
            return Answer(self._client, self.tokenizer, planned)
        adapters = self._with_adapters()
        copy: Copy = adapters.hold(adapter)
        ref = AdapterRef(key=copy.key, path=str(copy.path))
        return Answer(
            self._client, self.tokenizer, planned, ref, on_end=lambda: adapters.release(copy)
        )

    def _with_adapters(self) -> LocalAdapters:
        if self._adapters is None:
            raise InvalidRequest("adapters are off here: LLM(lora__enabled=True)", param="adapter")
        return self._adapters

    def _has_room(self, running: Mapping[int, Answer], n: int) -> bool:
        return sum(answer.n for answer in running.values()) + n <= self._window

    def _finished(
        self, running: dict[int, Answer]
    ) -> Iterator[tuple[int, Generation | JaxserveError]]:
        """Takes out what is done; where nothing is, takes in what the engine sends next."""
        done = [index for index, answer in running.items() if answer.advance()]
        for index in done:
            answer = running.pop(index)
            answer.cancel()
            yield index, answer.result()
        if not done:
            self._client.wait()

    def _all(self, requests: list[Request]) -> list[Generation]:
        for request in requests:
            self.plan(request)  # all are right before any is run
        results: list[Generation | None] = [None] * len(requests)
        num_tokens = 0
        bar = tqdm(total=len(requests), unit="prompt", leave=False, disable=hidden(self._bars))
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

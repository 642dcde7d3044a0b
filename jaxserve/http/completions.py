"""/v1/completions: one or several prompts, as text or token ids, continued."""

from __future__ import annotations

from typing import Any

from jaxserve import types
from jaxserve.errors import InvalidRequest, JaxserveError
from jaxserve.http.auth import Identity
from jaxserve.http.errors import error_event
from jaxserve.http.frontend import Frontend
from jaxserve.http.generation import Delta, Usage
from jaxserve.http.logprobs import TextOffsets, completion_logprobs, prompt_logprobs
from jaxserve.http.sampling import (
    Options,
    plan_outputs,
    read_options,
    refuse_unsupported,
    with_candidates_ranked,
)
from jaxserve.http.wire import Answer, Head, Work, encode, usage_fields
from jaxserve.text.fields import Fields
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ModelInfo, TokenLogprobs

#: OpenAI's default of max_tokens here.
DEFAULT_MAX_TOKENS = 16


async def read_completion(
    fields: Fields, frontend: Frontend, model: ModelInfo, identity: Identity
) -> Work:
    """A validated completion request.

    Raises:
        InvalidRequest, ContextTooLong, Forbidden: what is wrong, by field, value and limit.
    """
    max_choices = frontend.config.max_choices
    values = fields.texts_or_tokens("prompt", model.vocab_size, max_choices, "prompts")
    options = read_options(fields, model, frontend.tokenizer, identity, max_choices)
    if len(values) * options.candidates > max_choices:
        raise InvalidRequest(
            f"{len(values)} prompts with {options.candidates} sequences each come to "
            f"{len(values) * options.candidates}, the limit is {max_choices}",
            param="prompt",
        )
    echo = fields.flag("echo", False)
    options.max_tokens = fields.integer("max_tokens", None, 0, 2**31 - 1)
    if options.max_tokens == 0:
        if not echo:
            raise InvalidRequest("max_tokens may be 0 only with echo, got 0", param="max_tokens")
        options.discard = True
    num_top = fields.integer("logprobs", None, 0, types.MAX_LOGPROBS)
    num_prompt_top = options.sampling["prompt_logprobs"]
    if num_top is not None:
        options.sampling["logprobs"] = num_top
        if echo:
            options.sampling["prompt_logprobs"] = max(num_top, num_prompt_top or 0)
    if options.stream and options.sampling["prompt_logprobs"] is not None:
        field = "prompt_logprobs" if num_prompt_top is not None else "logprobs"
        raise InvalidRequest("log-probabilities of the prompt cannot be streamed", param=field)
    fields.neutral("suffix", "")
    add_special_tokens = fields.flag("add_special_tokens", True)
    refuse_unsupported(fields)
    fields.finish()
    prompts = [
        value
        if isinstance(value, list)
        else await frontend.encode(value, add_special_tokens=add_special_tokens)
        for value in values
    ]
    if not all(prompts):
        raise InvalidRequest("prompt is empty; it needs at least one token", param="prompt")
    if options.wanted is not None:
        async with frontend.checking_grammars(model):
            await frontend.grammars.check(options.wanted.grammar, model, options.wanted.param)
    with_candidates_ranked(options)
    samplings = plan_outputs(
        options,
        [len(prompt) for prompt in prompts],
        DEFAULT_MAX_TOKENS,
        model,
        frontend.positions_in_cache(),
        prompt_field="prompt",
    )
    echoed = None
    if echo:
        echoed = [
            value if isinstance(value, str) else frontend.tokenizer.decode(value)
            for value in values
        ]
    wire = CompletionWire(
        model.name, frontend.tokenizer, options, num_top, num_prompt_top, prompts, echoed
    )
    return Work(prompts=prompts, samplings=samplings, options=options, wire=wire)


class CompletionWire:
    """The completions format of one response.

    Args:
        num_top: alternatives to report beside each token; None for no log-probabilities.
        num_prompt_top: the same for `prompt_logprobs`.
        prompts: their token ids.
        echoed: their texts, if they are to stand before the output.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        options: Options,
        num_top: int | None,
        num_prompt_top: int | None,
        prompts: list[list[int]],
        echoed: list[str] | None,
    ) -> None:
        self._head = Head("cmpl-", "text_completion", model, include_usage=options.include_usage)
        self.response_id: str = self._head.fields["id"]
        self._tokenizer = tokenizer
        self._options = options
        self._num_top = num_top
        self._num_prompt_top = num_prompt_top
        self._prompts = prompts
        self._echoed = echoed
        self._plain = num_top is None and not options.return_token_ids
        self._opened: set[int] = set()
        self._streamed: dict[int, TextOffsets] = {}
        self._before, self._after = self._head.event_parts()
        self._bare = b',"logprobs":null,"finish_reason":null}' + self._after

    def events(self, delta: Delta) -> bytes:
        """See `Wire`."""
        index = delta.choice
        text = delta.text
        first = index not in self._opened
        if first:
            self._opened.add(index)
            if self._echoed is not None:
                text = self._echoed[index // self._options.n] + text
        if self._plain and delta.finish_reason is None:
            if not text:
                return b""
            return self._before + b'{"index":%d,"text":' % index + encode(text) + self._bare
        if not (text or delta.token_ids or delta.finish_reason):
            return b""
        choice: dict[str, Any] = {"index": index, "text": text}
        choice["logprobs"] = self._streamed_logprobs(delta) if delta.token_ids else None
        choice["finish_reason"] = delta.finish_reason
        if self._options.return_token_ids:
            choice["token_ids"] = delta.token_ids
            if first:
                choice["prompt_token_ids"] = self._prompts[index // self._options.n]
        return self._before + encode(choice) + self._after

    def ending(self, usage: Usage) -> bytes:
        """See `Wire`."""
        return self._head.ending(usage)

    def failure(self, error: JaxserveError) -> bytes:
        """See `Wire`."""
        return error_event(error)

    def document(self, answers: list[Answer], usage: Usage) -> bytes:
        """See `Wire`."""
        document: dict[str, Any] = dict(self._head.fields)
        document["choices"] = [
            self._choice(prompt, prompt * self._options.n + rank, answer, delta)
            for prompt, answer in enumerate(answers)
            for rank, delta in enumerate(answer.choices)
        ]
        document["usage"] = usage_fields(usage)
        return encode(document)

    def _choice(self, prompt: int, index: int, answer: Answer, delta: Delta) -> dict[str, Any]:
        echoed = self._echoed[prompt] if self._echoed is not None else ""
        choice: dict[str, Any] = {
            "index": index,
            "text": echoed + delta.text,
            "logprobs": self._logprobs(prompt, answer, delta),
            "finish_reason": delta.finish_reason,
        }
        if self._num_prompt_top is not None:
            choice["prompt_logprobs"] = prompt_logprobs(
                self._tokenizer, answer.prompt_logprobs, self._num_prompt_top
            )
        if self._options.return_token_ids:
            choice["prompt_token_ids"] = self._prompts[prompt]
            choice["token_ids"] = delta.token_ids
        return choice

    def _logprobs(self, prompt: int, answer: Answer, delta: Delta) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        entries: list[TokenLogprobs | int] = list(delta.logprobs)
        offset_of = self._offsets(prompt).next
        if self._echoed is not None:
            ids = self._prompts[prompt]
            entries = [ids[0], *answer.prompt_logprobs, *entries]
            before = TextOffsets(
                self._tokenizer, (), skip_special_tokens=True, limit=len(self._echoed[prompt])
            )
            echoed, after, left = before.next, offset_of, len(ids)

            def offset_of(token_id: int) -> int:
                nonlocal left
                left -= 1
                return echoed(token_id) if left >= 0 else after(token_id)

        return completion_logprobs(self._tokenizer, entries, self._num_top, offset_of)

    def _streamed_logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        offsets = self._streamed.get(delta.choice)
        if offsets is None:
            offsets = self._streamed[delta.choice] = self._offsets(delta.choice // self._options.n)
        return completion_logprobs(self._tokenizer, delta.logprobs, self._num_top, offsets.next)

    def _offsets(self, prompt: int) -> TextOffsets:
        """Of the output, behind an echoed prompt."""
        return TextOffsets(
            self._tokenizer,
            self._prompts[prompt],
            skip_special_tokens=self._options.skip_special_tokens,
            start=len(self._echoed[prompt]) if self._echoed is not None else 0,
        )

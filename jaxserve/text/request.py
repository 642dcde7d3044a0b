"""An offline request: what is asked for, and how that becomes token ids and sampling parameters.

The HTTP front end has its own reading of OpenAI's fields (`http.sampling`); this is the same for
Python callers, with the same names and bounds.
"""

from __future__ import annotations

import dataclasses
import difflib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve import types
from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.text.template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import ModelInfo, SamplingParams

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt or conversation, and how it is continued.

    Attributes:
        prompt: a text or token ids; or messages: {"role": …, "content": …} each, for the chat
            template, with template holding its further variables. One of the two.
        max_tokens: tokens to generate at most; None takes 256, or what the context has left if
            that is less.
        n: choices, drawn independently.
        stop: a string or several that end the output; include_stop keeps the one that did.
        skip_special_tokens: whether control tokens are left out of the text.
        seed: None draws one.
        temperature … prompt_logprobs: as in `SamplingParams`, with its defaults (temperature 1,
            nothing cut off, no penalties). Beyond it, logit_bias may be a mapping and bad_words
            may hold strings.
    """

    prompt: str | Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings.

        Raises:
            InvalidRequest: not strings.
        """
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise InvalidRequest(f"stop takes non-empty strings, got {stops}", param="stop")
        return stops


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """A request as the engine takes it; text: the prompt's, where it is text."""

    request: Request
    text: str | None
    token_ids: list[int]
    sampling: SamplingParams


def make_request(**options: Any) -> Request:
    """A request from options by name.

    Raises:
        InvalidRequest: an unknown name; the nearest is named.
    """
    known = [spec.name for spec in dataclasses.fields(Request)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InvalidRequest(f"unknown option {name!r}; the nearest is {near!r}", param=name)
    return Request(**options)


def plan(
    request: Request, tokenizer: Tokenizer, template: ChatTemplate | None, model: ModelInfo
) -> PlannedRequest:
    """Tokenizes and checks a request.

    Raises:
        InvalidRequest: what is wrong, by field, value and limit.
        ContextTooLong: the prompt, or the prompt with max_tokens, does not fit.
    """
    text, token_ids = _prompt(request, tokenizer, template)
    if not token_ids:
        raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
    for token in token_ids:
        if not 0 <= token < model.vocab_size:
            raise InvalidRequest(
                f"the prompt holds token id {token}; ids are between 0 and {model.vocab_size - 1}",
                param="prompt",
            )
    left = model.max_context - len(token_ids)
    wanted = 1 if request.max_tokens is None else _integer("max_tokens", request.max_tokens, 1)
    if wanted > left:
        raise ContextTooLong(
            f"the prompt has {len(token_ids)} tokens and {wanted} more were asked for, but the "
            f"model's context is {model.max_context}; shorten the prompt or lower max_tokens",
            param="max_tokens" if left > 0 else "prompt",
        )
    max_tokens = min(DEFAULT_MAX_TOKENS, left) if request.max_tokens is None else wanted
    if not 1 <= _integer("n", request.n) <= types.MAX_CHOICES:
        raise InvalidRequest(
            f"n must be between 1 and {types.MAX_CHOICES}, got {request.n}", param="n"
        )
    request.stops  # noqa: B018  (raises)
    return PlannedRequest(
        request=request,
        text=text,
        token_ids=token_ids,
        sampling=_sampling(request, tokenizer, max_tokens),
    )


def _prompt(
    request: Request, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[str | None, list[int]]:
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either a prompt or messages", param="prompt")
    if request.messages is not None:
        text = _rendered(request, template)
        return text, tokenizer.encode(text, add_special_tokens=False)
    if isinstance(request.prompt, str):
        return request.prompt, tokenizer.encode(request.prompt)
    return None, _integers("prompt", request.prompt or ())


def _rendered(request: Request, template: ChatTemplate | None) -> str:
    messages = request.messages
    if template is None:
        raise InvalidRequest("this model has no chat template; give model.chat_template a file")
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", param="messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"each message needs a role and content, got {str(message)[:100]}", param="messages"
            )
        if not isinstance(message.get("content"), str | list):
            raise InvalidRequest(
                f"a message's content must be text, got {str(message.get('content'))[:100]}",
                param="messages",
            )
    return template.render(messages, **dict(request.template))


def _sampling(request: Request, tokenizer: Tokenizer, max_tokens: int) -> SamplingParams:
    """Every value as the type that the engine's arrays need; it checks the bounds itself."""
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(SamplingParams):
        name, value = spec.name, getattr(request, spec.name)
        if spec.type in ("float", "bool"):
            values[name] = _number(name, value) if spec.type == "float" else bool(value)
        elif spec.type in ("int", "int | None"):
            values[name] = None if value is None else _integer(name, value)
    bias = request.logit_bias
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    values |= {
        "max_tokens": max_tokens,
        "seed": secrets.randbits(63) if request.seed is None else _integer("seed", request.seed),
        "stop_token_ids": tuple(_integers("stop_token_ids", request.stop_token_ids)),
        "logit_bias": tuple(
            (_integer("logit_bias", token), _number("logit_bias", value)) for token, value in pairs
        ),
        "bad_words": _bad_words(request, tokenizer),
    }
    if request.allowed_token_ids is not None:
        allowed = _integers("allowed_token_ids", request.allowed_token_ids)
        values["allowed_token_ids"] = tuple(allowed)
    return SamplingParams(**values)


def _bad_words(request: Request, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """A string as it is tokenized at the start of a text and inside one."""
    words: dict[tuple[int, ...], None] = {}
    for word in request.bad_words:
        if isinstance(word, str):
            for variant in (word, " " + word.lstrip()):
                words[tuple(tokenizer.encode(variant, add_special_tokens=False))] = None
        else:
            words[tuple(_integers("bad_words", word))] = None
    return tuple(words)


def _integers(name: str, values: Iterable[Any]) -> list[int]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InvalidRequest(f"{name} takes token ids, got {str(values)[:100]!r}", param=name)
    return [_integer(name, value) for value in values]


def _integer(name: str, value: Any, low: int | None = None) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequest(f"{name} takes an integer, got {str(value)[:100]!r}", param=name)
    if low is not None and value < low:
        raise InvalidRequest(f"{name} must be at least {low}, got {value}", param=name)
    return int(value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise InvalidRequest(f"{name} takes a number, got {str(value)[:100]!r}", param=name)
    return float(value)

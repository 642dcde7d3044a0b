"""An offline request: what is asked for, and how that becomes token ids and sampling parameters.

The HTTP front end has its own reading of OpenAI's sampling fields (`http.sampling`); this is the
same for Python callers, with the same names and bounds. Messages, tools and response formats are
read by the same code.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve import types
from jaxserve.errors import ContextTooLong, InvalidRequest
from jaxserve.structured.grammars import from_words
from jaxserve.text.asked_grammar import Wanted, read_grammar
from jaxserve.text.conversation import chat_messages
from jaxserve.text.dialect import PLAIN, Dialect
from jaxserve.text.fields import plain_fields
from jaxserve.text.held import hold
from jaxserve.text.message import MessageReader
from jaxserve.text.template import ChatTemplate
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools.asked import read_toolbox
from jaxserve.text.tools.tool import Toolbox
from jaxserve.text.values import flag, integer, integers, is_list, number, show, wrong
from jaxserve.types import Grammar, ModelInfo, SamplingParams

DEFAULT_MAX_TOKENS = 256
#: Names that `Request.template` may not have: they are rendering's own.
_RESERVED = ("self", "template", "messages", "toolbox")
#: Fields that only a conversation has.
_OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt or conversation, and how it is continued.

    Attributes:
        prompt: a text or token ids; or messages: {"role": …, "content": …} each, as OpenAI's chat
            has them, for the chat template, with template holding its further variables. One of the
            two.
        max_tokens: tokens to generate at most; None takes 256, or what the context has left if
            that is less.
        n: choices, drawn independently.
        stop: a string or several that end the output; include_stop keeps the one that did.
        skip_special_tokens: whether control tokens are left out of the text.
        seed: None draws one.
        cache_salt: only requests with the same one share cached pages.
        grammar: what the output must match: one of json (a schema), regex, choice (texts), grammar
            (Lark or EBNF) and json_object, by name; or what `jaxserve.structured.grammars` makes.
        response_format: the same in OpenAI's words: json_object, json_schema or structural_tag.
        tools, tool_choice, parallel_tool_calls: what a conversation's model may call, as in
            OpenAI's chat.
        adapter: a LoRA adapter: its name in `lora.adapters` or below `lora.root`, or a directory.
        temperature … prompt_logprobs: as in `SamplingParams`, with its defaults (temperature 1,
            nothing cut off, no penalties). Beyond it, logit_bias may be a mapping (its keys may be
            written as text, as JSON does) and bad_words may hold strings.
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
    cache_salt: str = ""
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
    logit_bias: Mapping[int | str, float] | Sequence[tuple[int, float]] = ()
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | Mapping[str, Any] | None = None
    response_format: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    adapter: str | os.PathLike[str] | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings.

        Raises:
            InvalidRequest: not strings.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not is_list(stops) or not all(isinstance(stop, str) and stop for stop in stops):
            raise wrong("stop", "non-empty strings", self.stop)
        return list(stops)


@dataclass(frozen=True, kw_only=True)
class PlannedRequest:
    """A request as the engine takes it.

    Attributes:
        text: the prompt's, where it is text.
        reader: makes what reads a choice's text as a message; None where it is plain text.
        shown_tokens: control tokens that this needs to see.
    """

    request: Request
    text: str | None
    token_ids: list[int]
    sampling: SamplingParams
    reader: Callable[[], MessageReader] | None = None
    shown_tokens: Collection[int] = ()


def make_request(**options: Any) -> Request:
    """A request from options by name; None stands for an option's default.

    Raises:
        InvalidRequest: an unknown name; the nearest is named.
    """
    known = [spec.name for spec in dataclasses.fields(Request)]
    for name in options:
        if name not in known:
            name = name[:100]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InvalidRequest(f"unknown option {name!r}; the nearest is {near!r}", param=name)
    return Request(**{name: value for name, value in options.items() if value is not None})


def plan(
    request: Request,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    model: ModelInfo,
    dialect: Dialect = PLAIN,
    check: Callable[[Wanted], None] = lambda wanted: None,
) -> PlannedRequest:
    """Tokenizes and checks a request, whatever the types of its values are.

    Args:
        dialect: of the model's messages.
        check: raises `GrammarError` where a grammar is wrong.

    Raises:
        InvalidRequest: what is wrong, by field, value and limit.
        ContextTooLong: the prompt, or the prompt with max_tokens, does not fit.
    """
    toolbox = _toolbox(request)
    text, token_ids = _prompt(request, tokenizer, template, dialect, toolbox)
    if not token_ids:
        raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
    for token in token_ids:
        if not 0 <= token < model.vocab_size:
            raise InvalidRequest(
                f"the prompt holds token id {token}; ids are between 0 and {model.vocab_size - 1}",
                param="prompt",
            )
    max_tokens = _max_tokens(request, len(token_ids), model)
    _check_plain(request)
    sampling, wanted = _sampling(request, tokenizer, max_tokens), _wanted(request, tokenizer)
    reader = None
    if request.messages is not None:
        assert text is not None
        reader = dialect.reader(toolbox, text)
        wanted = hold(dialect, toolbox, text, wanted, check)
    elif wanted is not None:
        check(wanted)
    if wanted is not None:
        sampling = dataclasses.replace(sampling, grammar=wanted.grammar)
    return PlannedRequest(
        request=request,
        text=text,
        token_ids=token_ids,
        sampling=sampling,
        reader=reader,
        shown_tokens=frozenset(dialect.special_tokens.values()) if reader is not None else (),
    )


def _max_tokens(request: Request, num_prompt: int, model: ModelInfo) -> int:
    left = model.max_context - num_prompt
    wanted = 1 if request.max_tokens is None else integer("max_tokens", request.max_tokens, 1)
    if wanted > left:
        raise ContextTooLong(
            f"the prompt has {num_prompt} tokens and {wanted} more were asked for, but the "
            f"model's context is {model.max_context}; shorten the prompt or lower max_tokens",
            param="max_tokens" if left > 0 else "prompt",
        )
    return min(DEFAULT_MAX_TOKENS, left) if request.max_tokens is None else wanted


def _check_plain(request: Request) -> None:
    """What goes on as it is."""
    if not 1 <= integer("n", request.n) <= types.MAX_CHOICES:
        raise InvalidRequest(
            f"n must be between 1 and {types.MAX_CHOICES}, got {request.n}", param="n"
        )
    request.stops  # noqa: B018  (raises)
    for name in ("include_stop", "skip_special_tokens"):
        flag(name, getattr(request, name))
    if not isinstance(request.cache_salt, str) or len(request.cache_salt) > types.MAX_CACHE_SALT:
        wanted = f"a string of at most {types.MAX_CACHE_SALT} characters"
        raise wrong("cache_salt", wanted, request.cache_salt)
    if not isinstance(request.adapter, str | os.PathLike | None) or request.adapter == "":
        raise wrong("adapter", "a name or a directory", request.adapter)


def _toolbox(request: Request) -> Toolbox:
    """The tools that may be called.

    Raises:
        InvalidRequest: also where there is no conversation, or the template has others.
    """
    fields = plain_fields(**{name: getattr(request, name) for name in _OF_TOOLS})
    toolbox = read_toolbox(fields)
    if toolbox.tools and request.messages is None:
        raise InvalidRequest("tools go with messages, not with a prompt", param="tools")
    return toolbox


def _prompt(
    request: Request,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    dialect: Dialect,
    toolbox: Toolbox,
) -> tuple[str | None, list[int]]:
    if (request.prompt is None) == (request.messages is None):
        raise InvalidRequest("give either a prompt or messages", param="prompt")
    if request.messages is not None:
        text = _rendered(request, template, dialect, toolbox)
        return text, tokenizer.encode(text, add_special_tokens=False)
    if isinstance(request.prompt, str):
        return request.prompt, tokenizer.encode(request.prompt)
    return None, integers("prompt", request.prompt, "text or token ids")


def _rendered(
    request: Request, template: ChatTemplate | None, dialect: Dialect, toolbox: Toolbox
) -> str:
    if template is None:
        raise InvalidRequest("this model has no chat template; give model.chat_template a file")
    messages = chat_messages(plain_fields(messages=request.messages))
    variables = _variables(request.template)
    if variables.get("tools") is None:
        variables.pop("tools", None)
    elif toolbox.tools:
        raise InvalidRequest("give either tools or template's tools", param="tools")
    else:  # told to the template, and their calls left as text
        return template.render(messages, **variables)
    return dialect.render(template, messages, toolbox=toolbox, **variables)


def _variables(template: Any) -> dict[str, Any]:
    if not isinstance(template, Mapping) or not all(isinstance(name, str) for name in template):
        raise wrong("template", "variables of the chat template by name", template)
    for name in _RESERVED:
        if name in template:
            raise InvalidRequest(f"template may not have a variable {name!r}", param="template")
    tools = template.get("tools")
    if tools is not None and not (
        is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise InvalidRequest(
            f"template's tools must be a list of objects, got {show(tools)}", param="template"
        )
    return dict(template)


def _sampling(request: Request, tokenizer: Tokenizer, max_tokens: int) -> SamplingParams:
    """Every value as the type that the engine's arrays need; it checks the bounds itself."""
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(SamplingParams):
        name, value = spec.name, getattr(request, spec.name)
        if spec.type == "bool":
            values[name] = flag(name, value)
        elif spec.type == "float":
            values[name] = number(name, value)
        elif spec.type in ("int", "int | None"):
            values[name] = None if value is None else integer(name, value)
    values |= {
        "max_tokens": max_tokens,
        "seed": secrets.randbits(63) if request.seed is None else integer("seed", request.seed),
        "stop_token_ids": tuple(integers("stop_token_ids", request.stop_token_ids)),
        "logit_bias": _logit_bias(request.logit_bias),
        "bad_words": _bad_words(request.bad_words, tokenizer),
    }
    if request.allowed_token_ids is not None:
        allowed = integers("allowed_token_ids", request.allowed_token_ids)
        values["allowed_token_ids"] = tuple(allowed)
    return SamplingParams(**values)


def _wanted(request: Request, tokenizer: Tokenizer) -> Wanted | None:
    """What the output, or a message's words, must match."""
    fields = plain_fields(response_format=request.response_format)
    asked = read_grammar(fields, tokenizer)
    grammar = request.grammar
    if grammar is None:
        return asked
    if asked is not None:
        raise InvalidRequest(
            "grammar and response_format exclude each other; give one of them", param="grammar"
        )
    if isinstance(grammar, Mapping):
        return Wanted(from_words(grammar), "grammar")
    if not isinstance(grammar, Grammar):
        raise wrong("grammar", "an object, or what jaxserve.structured.grammars makes", grammar)
    return Wanted(grammar, "grammar")


def _logit_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    if isinstance(bias, Mapping):
        pairs = [(_token_of_key(key), value) for key, value in bias.items()]
    elif is_list(bias) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in bias):
        pairs = bias
    else:
        raise wrong("logit_bias", "a number by token id", bias)
    return tuple(
        (integer("logit_bias", token), number("logit_bias", value)) for token, value in pairs
    )


def _token_of_key(key: Any) -> Any:
    """A key of a JSON object is text, even where a token id is meant."""
    is_digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12
    return int(key) if is_digits else key


def _bad_words(words: Any, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """A string as it is tokenized at the start of a text and inside one."""
    if not is_list(words):
        raise wrong("bad_words", "a list of strings or of token ids", words)
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        if isinstance(word, str) and word:
            for variant in (word, " " + word.lstrip()):
                sequences[tuple(tokenizer.encode(variant, add_special_tokens=False))] = None
        else:
            sequences[tuple(integers("bad_words", word, "non-empty strings or token ids"))] = None
    return tuple(sequences)

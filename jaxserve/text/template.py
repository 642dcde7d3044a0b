"""Chat templates: a model's Jinja program that writes messages as one prompt.

Templates come with the model or from the administrator's file, never from a client; messages come
from clients and are only ever data. What templates may use follows Hugging Face's conventions
(huggingface.co/docs/transformers/chat_templating_writing): `messages`, `tools`,
`add_generation_prompt`, the special tokens by name, `raise_exception`, `strftime_now`, `tojson`.

Invariants: the environment is Jinja's immutable sandbox; whatever goes wrong while rendering is
the request's fault (`InvalidRequest`), since the same template works for other messages.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxserve.errors import InvalidRequest, WeightsError
from jaxserve.text.template_files import find_template

#: Bounds of one rendering. Time is looked at whenever the template has written something.
MAX_CHARS = 16 * 1024 * 1024
MAX_SECONDS = 5.0


def load_chat_template(path: Path, override: str = "") -> ChatTemplate | None:
    """The chat template of a model; None if it has none.

    Args:
        path: the model's directory or .gguf file.
        override: path of a Jinja file to use instead; the model's special tokens stay known to it.

    Raises:
        WeightsError: a file is broken or missing, or the template is not valid Jinja.
    """
    found = find_template(path)
    if override:
        try:
            source = Path(override).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WeightsError(f"cannot read the chat template {override}: {error}") from error
        return ChatTemplate(source, special_tokens=found.special_tokens)
    if not found.source:
        return None
    return ChatTemplate(
        found.source, special_tokens=found.special_tokens, tools_source=found.tools_source
    )


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        special_tokens: names templates know special tokens by ("bos_token", …), and their text.
        tools_source: another template for requests that have tools, where the model has one.

    Raises:
        WeightsError: a source is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        tools_source: str = "",
    ) -> None:
        self.source = source
        self.tools_source = tools_source
        self._special_tokens = dict(special_tokens or {})
        self._template = _compile(source)
        self._tools_template = _compile(tools_source) if tools_source else self._template

    @property
    def knows_tools(self) -> bool:
        """Whether it writes the tools of a request."""
        words = _ENVIRONMENT.lex(self.source + self.tools_source)
        return any(kind == "name" and word == "tools" for _, kind, word in words)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Messages as one prompt, special tokens written out.

        Args:
            messages: with role and content; content is a string or a list of text parts, which are
                joined by newlines.
            add_generation_prompt: end with the opening of the assistant's turn.
            kwargs: further variables of the template (`enable_thinking`, …); the others go before.

        Raises:
            InvalidRequest: the template refuses these messages or fails on them, or its output
                passes MAX_CHARS or takes longer than MAX_SECONDS.
        """
        template = self._tools_template if tools else self._template
        variables: dict[str, Any] = kwargs | self._special_tokens
        variables |= {
            "messages": [_with_plain_content(message) for message in messages],
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _bounded(template, variables)
        except InvalidRequest:
            raise
        except jinja2.TemplateError as error:
            raise _refused(error.message or type(error).__name__) from error
        except (  # what a template can meet in data that it did not expect
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise _refused(f"{type(error).__name__}: {error}") from error


def _bounded(template: jinja2.Template, variables: dict[str, Any]) -> str:
    deadline = time.monotonic() + MAX_SECONDS
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate(variables):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_CHARS:
            raise _refused(f"it writes more than {MAX_CHARS} characters; send shorter messages")
        if time.monotonic() > deadline:
            raise _refused(f"it takes more than {MAX_SECONDS:.0f} s; send fewer messages")
    return "".join(pieces)


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(
        f"the model's chat template cannot write these messages: {reason}", param="messages"
    )


def _with_plain_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list | tuple):
        return message
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise InvalidRequest(
                f"message content may hold text parts only, got {str(part)[:100]}",
                param="messages",
            )
        texts.append(text)
    return {**message, "content": "\n".join(texts)}


# ---------------------------------------------------------------------------- the environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's text, for training: no-op."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The body as if it stood there without the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise WeightsError(
            f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
        ) from error


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


_ENVIRONMENT = _environment()

"""Tools for models whose chat template knows none: told in the system message, in plain words.

    You can call functions. … <tools> … </tools> … To call one, answer in this form: …

Earlier calls are written as the model would have written them, and what came of them is told by the
user. So every model with a chat template can be asked to call tools; whether it does so well is a
matter of its training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.text.tools.notation import Notation
from jaxserve.text.tools.tool import Toolbox

_INSTRUCTIONS = """\
You can call functions. Each is described here by one JSON object:
<tools>
{tools}
</tools>

To call one, answer with its name and its arguments in exactly this form:
{example}
The arguments must match the function's parameters.{several} What comes of a call is told to you \
between <tool_response> and </tool_response>."""
_SEVERAL = " Several calls may follow each other."
_EXAMPLE = ("function-name", '{"parameter": "value"}')


def without_tools(
    messages: Sequence[Mapping[str, Any]],
    toolbox: Toolbox,
    notation: Notation,
    *,
    system_role: bool = True,
) -> list[dict[str, Any]]:
    """The same conversation in messages that any chat template takes.

    Args:
        system_role: whether the template knows system messages; where not, the first user's
            message opens with the instructions.
    """
    plain: list[dict[str, Any]] = []
    for message in messages:
        written = _plain(message, notation)
        same_turn = written["role"] == "user" and plain and plain[-1]["role"] == "user"
        if same_turn and (message["role"] == "tool" or plain[-1].get("answers")):
            written["content"] = plain.pop()["content"] + "\n" + written["content"]
        plain.append(written | {"answers": message["role"] == "tool"})
    for message in plain:
        del message["answers"]
    if toolbox:
        _instruct(plain, instructions(toolbox, notation), "system" if system_role else "user")
    return plain


def instructions(toolbox: Toolbox, notation: Notation) -> str:
    """What a model is told of its tools."""
    documents = [json.dumps(tool.document, ensure_ascii=False) for tool in toolbox.tools]
    calls = [_EXAMPLE] if not notation.keyword_arguments else [("name", '{"parameter": "value"}')]
    return _INSTRUCTIONS.format(
        tools="\n".join(documents),
        example=notation.written(calls),
        several=_SEVERAL if toolbox.several else "",
    )


def _plain(message: Mapping[str, Any], notation: Notation) -> dict[str, Any]:
    """One message without fields of tools."""
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    written = dict(message)
    calls = written.pop("tool_calls", None)
    if calls:
        each = [(call["function"]["name"], _json(call["function"]["arguments"])) for call in calls]
        words = [written["content"]] if written["content"] else []
        written["content"] = "\n".join([*words, notation.written(each)])
    return written


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _instruct(messages: list[dict[str, Any]], text: str, role: str) -> None:
    first = messages[0] if messages else None
    if first is not None and first["role"] == role:
        before = [first["content"]] if role == "system" and first["content"] else []
        after = [first["content"]] if role == "user" else []
        messages[0] = first | {"content": "\n\n".join([*before, text, *after])}
    else:
        messages.insert(0, {"role": role, "content": text})

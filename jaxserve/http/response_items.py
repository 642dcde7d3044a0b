"""The `input` of /v1/responses: items, from a body's fields to what chat templates take.

A turn of the assistant is several items there (reasoning, words, calls); here it is one message.
"""

from __future__ import annotations

from typing import Any

from jaxserve.text.conversation import MAX_MESSAGES, text_content, text_parts
from jaxserve.text.fields import Fields

ROLES = ("system", "developer", "user", "assistant")
KINDS = ("message", "function_call", "function_call_output", "reasoning")
_STATUSES = ("completed", "incomplete", "in_progress")
_TEXTS = ("input_text", "output_text", "text")


def input_messages(fields: Fields) -> list[dict[str, Any]]:
    """The fields `instructions` and `input`.

    Raises:
        InvalidRequest: what is wrong, by field, value and limit.
    """
    turns = _Turns()
    instructions = fields.text("instructions")
    if instructions is not None:
        turns.messages.append({"role": "system", "content": instructions})
    value = fields.take("input")
    if type(value) is str:
        turns.messages.append({"role": "user", "content": value})
        return turns.messages
    if type(value) is not list or not 0 < len(value) <= MAX_MESSAGES:
        raise fields.wrong("input", f"a string or a list of 1 to {MAX_MESSAGES} items", value)
    for index, item in enumerate(value):
        if type(item) is not dict:
            raise fields.wrong(f"input[{index}]", "an object", item)
        _item(fields.inner(item, f"input[{index}]."), turns)
    return turns.messages


class _Turns:
    """Messages, as items are added.

    Attributes:
        names: of the tools that earlier calls called, by their ids.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}

    def assistant(self) -> dict[str, Any]:
        """The assistant's turn that goes on, or begins."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant":
            last = {"role": "assistant", "content": ""}
            self.messages.append(last)
        return last


def _item(fields: Fields, turns: _Turns) -> None:
    kind = fields.take("type")
    match kind:
        case None | "message":
            _message(fields, turns)
        case "function_call":
            _call(fields, turns)
        case "function_call_output":
            _call_output(fields, turns)
        case "reasoning":
            _reasoning(fields, turns)
        case _:
            raise fields.wrong("type", f"one of {', '.join(KINDS)}", kind)
    fields.text("id")
    fields.neutral("status", *_STATUSES)
    fields.finish()


def _message(fields: Fields, turns: _Turns) -> None:
    role = fields.take("role")
    if role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}", role)
    fields.neutral("phase", "commentary", "final_answer")
    content = text_content(fields, _TEXTS)
    if content is None:
        raise fields.wrong("content", "a string or a list of text parts", None)
    if role == "assistant":
        turn = turns.assistant()
        turn["content"] = "\n".join(filter(None, (turn["content"], content)))
    else:
        role = "system" if role == "developer" else role
        turns.messages.append({"role": role, "content": content})


def _call(fields: Fields, turns: _Turns) -> None:
    call_id, name, arguments = map(fields.text, ("call_id", "name", "arguments"))
    for field, value in (("call_id", call_id), ("name", name), ("arguments", arguments)):
        if not value and (field != "arguments" or value is None):
            raise fields.wrong(field, "a string", value)
    function = {"name": name, "arguments": arguments or "{}"}
    call = {"id": call_id, "type": "function", "function": function}
    turns.assistant().setdefault("tool_calls", []).append(call)
    turns.names[call_id] = name


def _call_output(fields: Fields, turns: _Turns) -> None:
    call_id = fields.text("call_id")
    if call_id is None:
        raise fields.wrong("call_id", "the id of a call", None)
    output = fields.take("output")
    if type(output) is list:
        output = "\n".join(text_parts(fields, "output", output, _TEXTS))
    elif type(output) is not str:
        raise fields.wrong("output", "a string or a list of text parts", output)
    message = {"role": "tool", "content": output, "tool_call_id": call_id}
    name = fields.text("name") or turns.names.get(call_id)
    if name is not None:
        message["name"] = name
    turns.messages.append(message)


def _reasoning(fields: Fields, turns: _Turns) -> None:
    texts: list[str] = []
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        value = fields.take(name)
        if value is None:
            continue
        if type(value) is not list:
            raise fields.wrong(name, "a list of text parts", value)
        read = text_parts(fields, name, value, (kind,))
        texts = texts or read  # the summary counts where there is nothing else
    fields.neutral("encrypted_content")
    if texts:
        turns.assistant()["reasoning_content"] = "\n".join(texts)

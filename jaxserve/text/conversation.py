"""Chat messages, from a request's fields to what chat templates take."""

from __future__ import annotations

from typing import Any

from jaxserve.text.fields import Fields

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 10_000
MAX_CALLS = 128


def chat_messages(fields: Fields) -> list[dict[str, Any]]:
    """The field `messages`.

    Raises:
        InvalidRequest: what is wrong, by field, value and limit.
    """
    values = fields.take("messages")
    if type(values) is not list or not 0 < len(values) <= MAX_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages", values)
    messages = []
    names: dict[str, str] = {}  # of the tools that earlier calls called, by their ids
    for index, value in enumerate(values):
        if type(value) is not dict:
            raise fields.wrong(f"messages[{index}]", "an object", value)
        messages.append(_message(Fields(value, f"messages[{index}]."), names))
    return messages


def text_content(fields: Fields, kinds: tuple[str, ...] = ("text",)) -> str | None:
    """The field `content`: a string, or text parts, which are joined by newlines; None if absent.

    Args:
        kinds: types that a part of text may have.
    """
    value = fields.take("content")
    if value is None or type(value) is str:
        return value
    if type(value) is not list or not value:
        raise fields.wrong("content", "a string or a list of text parts", value)
    return "\n".join(text_parts(fields, "content", value, kinds))


def text_parts(fields: Fields, name: str, values: list[Any], kinds: tuple[str, ...]) -> list[str]:
    """The texts of a list of text parts."""
    texts = []
    for index, part in enumerate(values):
        if type(part) is not dict:
            raise fields.wrong(f"{name}[{index}]", "a text part", part)
        part_fields = fields.inner(part, f"{name}[{index}].")
        kind = part_fields.take("type")
        if kind not in kinds:
            wanted = f"{' or '.join(kinds)}, the only kind supported"
            raise part_fields.wrong("type", wanted, kind)
        text = part_fields.text("text")
        if text is None:
            raise part_fields.wrong("text", "a string", None)
        texts.append(text)
        if kind == "output_text":
            part_fields.take("annotations")
            part_fields.take("logprobs")
        part_fields.finish()
    return texts


def _message(fields: Fields, names: dict[str, str]) -> dict[str, Any]:
    role = fields.take("role")
    if type(role) is not str or role not in ROLES:
        raise fields.wrong("role", f"one of {', '.join(ROLES)}", role)
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = _calls(fields) if role == "assistant" else None
    content = text_content(fields)
    if content is None:
        if not calls:
            raise fields.wrong("content", "a string or a list of text parts", None)
        content = ""
    message["content"] = content
    if calls:
        message["tool_calls"] = calls
        names |= {call["id"]: call["function"]["name"] for call in calls}
    name = fields.text("name")
    if role == "tool":
        call_id = fields.text("tool_call_id")
        if call_id is None:
            raise fields.wrong("tool_call_id", "the id of a call", None)
        message["tool_call_id"] = call_id
        name = name or names.get(call_id)
    if role == "assistant":
        reasoning = fields.text("reasoning_content")
        if reasoning:
            message["reasoning_content"] = reasoning
    if name is not None:
        message["name"] = name
    for unused in ("refusal", "annotations", "audio", "function_call"):
        fields.neutral(unused, [])
    if role != "tool":
        fields.neutral("tool_call_id")
    if role != "assistant":
        fields.neutral("tool_calls", [])
    fields.finish()
    return message


def _calls(fields: Fields) -> list[dict[str, Any]]:
    values = fields.take("tool_calls")
    if values is None:
        return []
    if type(values) is not list or len(values) > MAX_CALLS:
        raise fields.wrong("tool_calls", f"a list of at most {MAX_CALLS} calls", values)
    calls = []
    for index, value in enumerate(values):
        if type(value) is not dict:
            raise fields.wrong(f"tool_calls[{index}]", "an object", value)
        call = fields.inner(value, f"tool_calls[{index}].")
        kind = call.take("type")
        if kind not in ("function", None):
            raise call.wrong("type", "function, the only kind supported", kind)
        call_id = call.text("id")
        function = call.nested("function")
        if call_id is None:
            raise call.wrong("id", "a string", None)
        if function is None:
            raise call.wrong("function", "an object", None)
        calls.append({"id": call_id, "type": "function", "function": _function_call(function)})
        call.neutral("index")
        call.finish()
    return calls


def _function_call(fields: Fields) -> dict[str, str]:
    name, arguments = fields.text("name"), fields.text("arguments")
    if not name:
        raise fields.wrong("name", "a tool's name", name)
    if arguments is None:
        raise fields.wrong("arguments", "a JSON object as a string", None)
    fields.finish()
    return {"name": name, "arguments": arguments or "{}"}

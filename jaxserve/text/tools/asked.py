"""`tools`, `tool_choice` and `parallel_tool_calls`, from a request's fields to a `Toolbox`.

Chat and responses spell the same things differently: {"type": "function", "function": {"name": …}}
in the one is {"type": "function", "name": …} in the other (`flat`).
"""

from __future__ import annotations

from typing import Any

from jaxserve.errors import InvalidRequest
from jaxserve.text.fields import Fields, show
from jaxserve.text.tools.tool import MAX_TOOLS, NAME, Tool, Toolbox

MODES = ("none", "auto", "required")


def read_toolbox(fields: Fields, *, flat: bool = False, num_bytes: int = 0) -> Toolbox:
    """The tools of a request, and which of them may or must be called.

    Args:
        num_bytes: of the tools as JSON.

    Raises:
        InvalidRequest: what is wrong, by field, value and limit.
    """
    tools = _tools(fields, flat)
    several = fields.flag("parallel_tool_calls", True)
    names = frozenset(tool.name for tool in tools)
    choice = fields.take("tool_choice")
    if choice is None:
        choice = "auto"
    if isinstance(choice, str):
        if choice not in MODES:
            raise fields.wrong("tool_choice", f"{', '.join(MODES)} or an object", choice)
        if choice == "required" and not tools:
            raise InvalidRequest("tool_choice required needs tools", param="tool_choice")
        return Toolbox(
            tools=tools,
            callable=frozenset() if choice == "none" else names,
            required=choice == "required",
            several=several,
            num_bytes=num_bytes,
        )
    inner = fields.nested("tool_choice")
    assert inner is not None
    kind = inner.take("type")
    if kind == "function":
        name = _chosen_name(inner, flat)
        inner.finish()
        _check_known(fields, "tool_choice", [name], names)
        return Toolbox(
            tools=tools,
            callable=frozenset({name}),
            required=True,
            several=False,
            num_bytes=num_bytes,
        )
    if kind == "allowed_tools":
        required, chosen = _allowed(inner, flat)
        inner.finish()
        _check_known(fields, "tool_choice", chosen, names)
        return Toolbox(
            tools=tools,
            callable=frozenset(chosen),
            required=required,
            several=several,
            num_bytes=num_bytes,
        )
    raise inner.wrong("type", "function or allowed_tools", kind)


def tool_document(tool: Tool) -> dict[str, Any]:
    """A tool as responses repeat it."""
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.schema),
        "strict": tool.strict,
    }


def _tools(fields: Fields, flat: bool) -> list[Tool]:
    values = fields.take("tools")
    if values is None:
        return []
    if type(values) is not list or len(values) > MAX_TOOLS:
        raise fields.wrong("tools", f"a list of at most {MAX_TOOLS} tools", values)
    tools: dict[str, Tool] = {}
    for index, value in enumerate(values):
        if type(value) is not dict:
            raise fields.wrong(f"tools[{index}]", "an object", value)
        outer = fields.inner(value, f"tools[{index}].")
        kind = outer.take("type")
        if kind != "function":
            raise outer.wrong("type", "function, the only kind supported", kind)
        function = outer if flat else outer.nested("function")
        if function is None:
            raise outer.wrong("function", "an object", None)
        tool = _tool(function, f"tools[{index}]." + ("" if flat else "function."))
        if flat:
            function.neutral("defer_loading", False)
            function.neutral("output_schema")
            function.neutral("allowed_callers", ["direct"])
        function.finish()
        outer.finish()
        if tool.name in tools:
            raise function.wrong("name", "different from the other tools' names", tool.name)
        tools[tool.name] = tool
    return list(tools.values())


def _tool(fields: Fields, path: str) -> Tool:
    name = fields.take("name")
    if type(name) is not str or not NAME.fullmatch(name):
        raise fields.wrong("name", "1 to 64 letters, digits, _ or -", name)
    parameters = fields.take("parameters")
    if parameters is not None and type(parameters) is not dict:
        raise fields.wrong("parameters", "a JSON schema of an object", parameters)
    if parameters and parameters.get("type", "object") != "object":
        inner = fields.inner(parameters, "parameters.")
        raise inner.wrong("type", "object", parameters["type"])
    return Tool(
        name=name,
        description=fields.text("description"),
        parameters=parameters,
        strict=fields.flag("strict", False),
        param=path + "parameters",
    )


def _chosen_name(fields: Fields, flat: bool) -> str:
    function = fields if flat else fields.nested("function")
    if function is None:
        raise fields.wrong("function", "an object", None)
    name = function.text("name")
    if name is None:
        raise function.wrong("name", "a tool's name", None)
    if not flat:
        function.finish()
    return name


def _allowed(fields: Fields, flat: bool) -> tuple[bool, list[str]]:
    """allowed_tools: whether one is required, and their names."""
    inner = fields if flat else fields.nested("allowed_tools")
    if inner is None:
        raise fields.wrong("allowed_tools", "an object", None)
    mode = inner.take("mode")
    if mode not in ("auto", "required"):
        raise inner.wrong("mode", "auto or required", mode)
    values = inner.take("tools")
    if type(values) is not list or not 0 < len(values) <= MAX_TOOLS:
        raise inner.wrong("tools", f"a list of 1 to {MAX_TOOLS} tools", values)
    names = []
    for index, value in enumerate(values):
        if type(value) is not dict:
            raise inner.wrong(f"tools[{index}]", "an object", value)
        tool = inner.inner(value, f"tools[{index}].")
        kind = tool.take("type")
        if kind != "function":
            raise tool.wrong("type", "function, the only kind supported", kind)
        names.append(_chosen_name(tool, flat))
        tool.finish()
    if not flat:
        inner.finish()
    return mode == "required", names


def _check_known(fields: Fields, field: str, chosen: list[str], names: frozenset[str]) -> None:
    for name in chosen:
        if name not in names:
            known = ", ".join(sorted(names)[:5]) or "none"
            raise InvalidRequest(
                f"{field} names {show(name)}, which is not among tools ({known})", param=field
            )

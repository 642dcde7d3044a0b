"""The tools of one request, which of them may be called, and how often.

A tool is a function of the client's: a name, what it does, and a JSON schema of its arguments. The
model writes a call, the client runs it and sends what came of it as a message of the role "tool".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Of a request: OpenAI's limit.
MAX_TOOLS = 128
#: What a tool may be called, as OpenAI has it.
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)

#: Of a tool that says nothing of its arguments: it has none.
NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One function that may be called.

    Attributes:
        parameters: JSON schema of its arguments, an object; None where it was left out.
        strict: the schema must be held to. Where not, it is as far as that can be done.
        param: the request's field that the schema is in, for errors.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    param: str = "tools"

    @property
    def schema(self) -> Mapping[str, Any]:
        """The arguments' schema."""
        return NO_PARAMETERS if self.parameters is None else self.parameters

    @property
    def document(self) -> dict[str, Any]:
        """As chat templates take it (and OpenAI's chat requests have it)."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.schema)
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """What a request says of tools.

    Attributes:
        tools: that the model is told of.
        callable: names of those that it may call; none for `tool_choice: none`.
        required: it must call one.
        several: it may call more than one.
        num_bytes: of the tools as JSON, so that it is known how much work they are.
    """

    tools: Sequence[Tool] = ()
    callable: frozenset[str] = field(default_factory=frozenset)
    required: bool = False
    several: bool = True
    num_bytes: int = 0

    @property
    def callables(self) -> list[Tool]:
        """The tools that may be called, in their order."""
        return [tool for tool in self.tools if tool.name in self.callable]

    def __bool__(self) -> bool:
        return bool(self.callable)

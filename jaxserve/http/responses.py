"""/v1/responses: items in, items out, by the same road as chat.

Responses are not stored: a conversation goes on by sending its items again. What asks for storage
(`store: true`, `previous_response_id`, `conversation`) is refused by name.
"""

from __future__ import annotations

from typing import Any

from jaxserve import types
from jaxserve.errors import InvalidRequest
from jaxserve.http.auth import Identity
from jaxserve.http.body import num_bytes
from jaxserve.http.frontend import Frontend
from jaxserve.http.reading import plan_message
from jaxserve.http.response_items import input_messages
from jaxserve.http.response_wire import ResponseWire
from jaxserve.http.sampling import Options, plan_outputs, read_options, refuse_unsupported
from jaxserve.http.wire import Work
from jaxserve.structured.grammars import json_object, json_schema
from jaxserve.text.asked_grammar import Wanted
from jaxserve.text.fields import Fields
from jaxserve.text.tools.asked import read_toolbox, tool_document
from jaxserve.types import ModelInfo

_LOGPROBS = "message.output_text.logprobs"
_NOT_STORED = "is not supported: responses are not stored; send the conversation's items as input"
#: What we do not do, with what asks for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "generate": (True,),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "truncation": ("disabled",),
}


async def read_response(
    fields: Fields, frontend: Frontend, model: ModelInfo, identity: Identity
) -> Work:
    """A validated request for a response.

    Raises:
        InvalidRequest, ContextTooLong, Forbidden: what is wrong, by field, value and limit.
    """
    messages = input_messages(fields)
    toolbox = read_toolbox(fields, flat=True, num_bytes=num_bytes(fields, "tools"))
    asked = _asked(fields, len(toolbox.tools) > 0)
    fields.neutral("n", 1)
    fields.neutral("best_of", 1)
    options = read_options(fields, model, frontend.tokenizer, identity, 1)
    options.max_tokens = fields.integer("max_output_tokens", None, 1, 2**31 - 1)
    options.max_tokens_field = "max_output_tokens"
    num_top = _num_top(fields, options)
    text_format, wanted = _text(fields)
    _refuse(fields)
    refuse_unsupported(fields)
    fields.finish()
    if wanted is not None:
        if options.wanted is not None:
            raise InvalidRequest(
                f"{wanted.param} and {options.wanted.param} exclude each other; send one of them",
                param=options.wanted.param,
            )
        options.wanted = wanted
    text = await frontend.render(messages, toolbox, add_generation_prompt=True)
    prompt = await frontend.encode(text, add_special_tokens=False)
    if not prompt:
        raise InvalidRequest("input comes to an empty prompt", param="input")
    await plan_message(frontend, model, options, toolbox, text)
    samplings = plan_outputs(
        options, [len(prompt)], None, model, frontend.positions_in_cache(), prompt_field="input"
    )
    shown = asked | {
        "model": model.name,
        "max_output_tokens": options.max_tokens,
        "parallel_tool_calls": toolbox.several,
        "temperature": options.sampling["temperature"],
        "top_p": options.sampling["top_p"],
        "text": {"format": text_format},
        "tools": [tool_document(tool) for tool in toolbox.tools],
        "top_logprobs": num_top or 0,
    }
    wire = ResponseWire(shown, frontend.tokenizer, num_top, reads=options.reader is not None)
    return Work(prompts=[prompt], samplings=samplings, options=options, wire=wire)


def _asked(fields: Fields, has_tools: bool) -> dict[str, Any]:
    """Fields of the response that repeat the request's, or say what is always so."""
    return {
        "background": False,
        "instructions": fields.peek("instructions"),
        "max_tool_calls": None,
        "metadata": fields.peek("metadata") or {},
        "previous_response_id": None,
        "prompt_cache_key": fields.peek("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": fields.peek("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "tool_choice": fields.peek("tool_choice") or ("auto" if has_tools else "none"),
        "truncation": "disabled",
        "user": fields.peek("user"),
    }


def _num_top(fields: Fields, options: Options) -> int | None:
    """Alternatives to report beside each token; None for no log-probabilities."""
    num_top = fields.integer("top_logprobs", None, 0, types.MAX_LOGPROBS)
    include = fields.take("include") or []
    if type(include) is not list:
        raise fields.wrong("include", "a list", include)
    for index, item in enumerate(include):
        if item != _LOGPROBS:
            raise fields.wrong(f"include[{index}]", f"{_LOGPROBS}, the only one supported", item)
    if options.sampling["prompt_logprobs"] is not None:
        raise InvalidRequest("prompt_logprobs is not part of a response", param="prompt_logprobs")
    if options.return_token_ids:
        raise InvalidRequest("return_token_ids is not part of a response", param="return_token_ids")
    if not include:
        if num_top:
            raise InvalidRequest(
                f"top_logprobs {num_top} needs include to hold {_LOGPROBS!r}", param="top_logprobs"
            )
        return None
    options.sampling["logprobs"] = num_top or 0
    return num_top or 0


def _text(fields: Fields) -> tuple[dict[str, Any], Wanted | None]:
    """`text.format`: as the response repeats it, and what the output must match."""
    plain = {"type": "text"}
    text = fields.nested("text")
    if text is None:
        return plain, None
    text.neutral("verbosity", "medium")
    inner = text.nested("format")
    text.finish()
    if inner is None:
        return plain, None
    kind = inner.take("type")
    shown: dict[str, Any] = {"type": kind}
    grammar = None
    if kind == "json_object":
        grammar = json_object()
    elif kind == "json_schema":
        name, schema = inner.text("name"), inner.take("schema")
        if not name:
            raise inner.wrong("name", "a name of the schema", name)
        if type(schema) is not dict:
            raise inner.wrong("schema", "a JSON schema", schema)
        shown = {
            "type": kind,
            "name": name,
            "schema": schema,
            "description": inner.text("description"),
            "strict": inner.flag("strict", True),
        }
        grammar = json_schema(schema)
    elif kind != "text":
        raise inner.wrong("type", "text, json_object or json_schema", kind)
    inner.finish()
    return shown, None if grammar is None else Wanted(grammar, "text.format")


def _refuse(fields: Fields) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        fields.neutral(name, why="is called max_output_tokens here")
    for name, accepted in _UNSUPPORTED.items():
        fields.neutral(name, *accepted)
    fields.neutral("store", False, why=_NOT_STORED)
    for name in ("previous_response_id", "conversation"):
        fields.neutral(name, why=_NOT_STORED)
    reasoning = fields.nested("reasoning")
    if reasoning is not None:
        for name in ("context", "effort", "generate_summary", "mode", "summary"):
            reasoning.neutral(name)
        reasoning.finish()

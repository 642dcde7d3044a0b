"""The format of /v1/responses: an output of items, whole or as typed events.

    response.created, response.in_progress
      response.output_item.added                      one item after another: reasoning, message,
        response.content_part.added                   function_call
          response.output_text.delta …, .done
        response.content_part.done
      response.output_item.done
    response.completed | response.incomplete | response.failed

Every event has a `sequence_number`. `Output` is both: it makes items of a message's parts, and says
the events by the way.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from jaxserve.errors import JaxserveError
from jaxserve.http.generation import Delta, Usage
from jaxserve.http.logprobs import chat_logprobs
from jaxserve.http.wire import Answer, cost_fields, encode
from jaxserve.text.message import CallEnd, CallStart, CallText, Part, Text, Thought
from jaxserve.text.read_choice import Took
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.types import FinishReason

#: Event names of the two kinds of items that hold text, and the type of their one part.
_TEXT, _REASONING = "output_text", "reasoning_text"


class ResponseWire:
    """One response.

    Args:
        fields: of the response object that say what was asked for.
        num_top: alternatives to report beside each token; None for no log-probabilities.
        reads: whether the deltas have parts; where not, they have text.
    """

    def __init__(
        self, fields: dict[str, Any], tokenizer: Tokenizer, num_top: int | None, *, reads: bool
    ) -> None:
        self.response_id = "resp_" + secrets.token_hex(24)
        self._fields = {
            "id": self.response_id,
            "object": "response",
            "created_at": int(time.time()),
            **fields,
        }
        self._output = Output()
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._reads = reads
        self._reason: str | None = None
        self._untold: list[dict[str, Any]] = []  # of tokens that have shown no text yet

    def events(self, delta: Delta) -> bytes:
        """See `Wire`."""
        output = self._output
        if not output.num_events:
            for kind in ("created", "in_progress"):
                output.say(f"response.{kind}", response=self._response("in_progress"))
        self._take(delta)
        return output.said()

    def ending(self, usage: Usage) -> bytes:
        """See `Wire`."""
        status = self._end()
        response = self._response(status, usage)
        self._output.say(f"response.{status}", response=response)
        return self._output.said()

    def failure(self, error: JaxserveError) -> bytes:
        """See `Wire`."""
        self._output.stop()
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": error.message}
        self._output.say("response.failed", response=response)
        return self._output.said()

    def document(self, answers: list[Answer], usage: Usage) -> bytes:
        """See `Wire`."""
        ((delta,),) = [answer.choices for answer in answers]
        self._take(delta)
        return encode(self._response(self._end(), usage))

    def _take(self, delta: Delta) -> None:
        parts: Sequence[Part] = delta.parts
        if self._num_top is not None:
            found = chat_logprobs(self._tokenizer, delta.logprobs, self._num_top)
            self._untold += found["content"]
        part_tokens = delta.part_tokens
        if not self._reads:
            parts = [Text(delta.text)] if delta.text else []
            part_tokens = [Took(0, len(self._untold))] * len(parts)
        for part, (before, own) in zip(parts, part_tokens, strict=True):
            end = before + own
            logprobs, self._untold = self._untold[before:end], self._untold[end:]
            self._output.add(part, logprobs if isinstance(part, Text) else [])
        self._reason = delta.finish_reason or self._reason

    def _end(self) -> str:
        """The output is complete, or as complete as it will be: the response's status."""
        if self._untold and not self._reads:
            self._output.add(Text(""), self._untold)
        status = "incomplete" if self._reason == FinishReason.LENGTH.value else "completed"
        self._output.finish(status)
        return status

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._fields,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": None,
            "incomplete_details": incomplete,
            "output": self._output.items,
            "usage": None if usage is None else response_usage(usage),
        }


def response_usage(usage: Usage) -> dict[str, Any]:
    """A response's usage object."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        **cost_fields(usage),
    }


class Output:
    """The items of one response, as parts of its message come.

    Attributes:
        items: as far as they have come; the last one may still be open.
        num_events: said so far.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.num_events = 0
        self._open = False
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._events: list[bytes] = []

    def say(self, kind: str, **fields: Any) -> None:
        """An event."""
        event = {"type": kind, "sequence_number": self.num_events, **fields}
        self.num_events += 1
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(event)))

    def said(self) -> bytes:
        """The events since the last call."""
        events, self._events = self._events, []
        return b"".join(events)

    def add(self, part: Part, logprobs: list[dict[str, Any]]) -> None:
        """The next part, with the log-probabilities of its tokens if they were asked for."""
        match part:
            case Text(text):
                self._write("message", text, logprobs)
            case Thought(text):
                self._write("reasoning", text, [])
            case CallStart(call_id, name):
                self._begin(
                    {
                        "id": _item_id("fc"),
                        "type": "function_call",
                        "call_id": call_id,
                        "name": name,
                        "arguments": "",
                    }
                )
            case CallText(text):
                self._pieces.append(text)
                self._say_of_item("response.function_call_arguments.delta", delta=text)
            case CallEnd():
                self._close("completed")

    def finish(self, status: str) -> None:
        """The message has ended; its last item has this status if it was not whole before."""
        if not self.items:
            self._write("message", "", [])
        self._close(status)

    def stop(self) -> None:
        """Nothing more will come: what is open stays as it is."""
        if self._open:
            self._fill("incomplete")
            self._open = False

    # ------------------------------------------------------------------------ items

    def _write(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> None:
        """Text of a message or of the reasoning, in an item that goes on or begins."""
        if not self._open or self.items[-1]["type"] != kind:
            if kind == "message":
                item = {"id": _item_id("msg"), "type": kind, "role": "assistant", "content": []}
            else:
                item = {"id": _item_id("rs"), "type": kind, "summary": [], "content": []}
            self._begin(item)
            self._say_of_part("response.content_part.added", part=_part(kind, "", []))
        if not text and not logprobs:
            return
        self._pieces.append(text)
        self._logprobs += logprobs
        more = {"logprobs": logprobs} if kind == "message" else {}
        self._say_of_part(f"response.{_name(kind)}.delta", delta=text, **more)

    def _begin(self, item: dict[str, Any]) -> None:
        self._close("completed")
        self._open = True
        self._pieces, self._logprobs = [], []
        self.items.append(item | {"status": "in_progress"})
        self.say(
            "response.output_item.added", output_index=len(self.items) - 1, item=self.items[-1]
        )

    def _close(self, status: str) -> None:
        if not self._open:
            return
        self._open = False
        self._fill(status)
        item, text = self.items[-1], "".join(self._pieces)
        kind = item["type"]
        if kind == "function_call":
            if status == "completed":
                self._say_of_item(
                    "response.function_call_arguments.done", name=item["name"], arguments=text
                )
        else:
            (part,) = item["content"]
            more = {"logprobs": self._logprobs} if kind == "message" else {}
            self._say_of_part(f"response.{_name(kind)}.done", text=text, **more)
            self._say_of_part("response.content_part.done", part=part)
        self.say("response.output_item.done", output_index=len(self.items) - 1, item=item)

    def _fill(self, status: str) -> None:
        """What has come of the last item, into it."""
        item, text = self.items[-1], "".join(self._pieces)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
        else:
            item["content"] = [_part(item["type"], text, self._logprobs)]

    def _say_of_part(self, kind: str, **fields: Any) -> None:
        self._say_of_item(kind, content_index=0, **fields)

    def _say_of_item(self, kind: str, **fields: Any) -> None:
        index = len(self.items) - 1
        self.say(kind, item_id=self.items[-1]["id"], output_index=index, **fields)


def _name(kind: str) -> str:
    return _TEXT if kind == "message" else _REASONING


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The one content part of an item."""
    if kind != "message":
        return {"type": _REASONING, "text": text}
    return {"type": _TEXT, "text": text, "annotations": [], "logprobs": logprobs}


def _item_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"

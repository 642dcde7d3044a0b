"""Messages between processes as MessagePack: arrays of a tag and the fields in their order.

What is read is checked against the types of the message's dataclass. Imports msgspec, which the
engine half does without where it runs in its client's own process.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any

import msgspec


class Codec:
    """Encodes one direction's messages, decodes the other's."""

    def __init__(self, union: types.UnionType) -> None:
        self._dataclasses: dict[type, type] = {}
        self._structs: dict[type, type] = {}
        for tag, kind in enumerate(typing.get_args(union)):
            struct = _struct_of(kind, tag)
            self._structs[kind] = struct
            self._dataclasses[struct] = kind
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(typing.Union[tuple(self._dataclasses)])  # noqa: UP007

    def encode(self, message: Any) -> bytes:
        """One message as a frame."""
        struct = self._structs[type(message)]
        return self._encoder.encode(msgspec.convert(message, struct, from_attributes=True))

    def decode(self, frame: bytes) -> Any:
        """One frame as a message.

        Raises:
            ValueError: the frame is not a message of this direction.
        """
        try:
            struct = self._decoder.decode(frame)
            return msgspec.convert(struct, self._dataclasses[type(struct)], from_attributes=True)
        except (msgspec.MsgspecError, RecursionError, OverflowError) as error:
            raise ValueError(f"not a message: {error}") from None


@functools.cache
def _struct_of(kind: type, tag: int | None = None) -> type:
    """The positional twin of a message dataclass, nested ones included."""
    hints = typing.get_type_hints(kind)
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        annotation = _positional(hints[field.name])
        if field.default is not dataclasses.MISSING:
            fields.append((field.name, annotation, field.default))
        elif field.default_factory is not dataclasses.MISSING:
            default = msgspec.field(default_factory=field.default_factory)
            fields.append((field.name, annotation, default))
        else:
            fields.append((field.name, annotation))
    return msgspec.defstruct(kind.__name__, fields, array_like=True, tag=tag, kw_only=True)


def _positional(annotation: Any) -> Any:
    """A type with each dataclass in it replaced by its positional twin."""
    if dataclasses.is_dataclass(annotation):
        return _struct_of(typing.cast(type, annotation))
    arguments = typing.get_args(annotation)
    if not arguments:
        return annotation
    replaced = tuple(_positional(a) if a is not Ellipsis else a for a in arguments)
    if isinstance(annotation, types.UnionType):
        return typing.Union[replaced]  # noqa: UP007 - built from a tuple
    return typing.get_origin(annotation)[replaced]

"""Frames on a stream: a length, then so many bytes."""

from __future__ import annotations

import asyncio
import struct

_HEAD = struct.Struct("<I")
#: A longer frame ends the connection that it comes from.
MAX_FRAME_BYTES = 256 * 1024 * 1024


class FrameTooLong(ValueError):
    """What was sent cannot be one of ours."""


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame.

    Raises:
        asyncio.IncompleteReadError: the other end has closed.
        FrameTooLong: it is.
    """
    (length,) = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    if length > MAX_FRAME_BYTES:
        raise FrameTooLong(f"a frame of {length} bytes")
    return await reader.readexactly(length)


def write_frame(writer: asyncio.StreamWriter, frame: bytes) -> None:
    """Queues a frame."""
    writer.write(_HEAD.pack(len(frame)) + frame)

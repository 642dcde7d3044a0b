"""SentencePiece model files: writing one for a vocabulary that came in another container.

A .model file is a protocol buffer (sentencepiece_model.proto of github.com/google/sentencepiece);
the few fields that decide how text is cut are written here by hand.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

#: Kinds of piece; GGUF numbers its token types the same way.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BPE = 2


def write_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    add_dummy_prefix: bool,
    byte_fallback: bool,
) -> bytes:
    """A BPE model that merges by score, keeps all spaces and changes no character.

    Args:
        pieces: by id, each different and not empty; exactly one must be UNKNOWN.
    """
    parts: list[bytes] = []
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        body = _bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        parts.append(_bytes(1, body))
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, int(byte_fallback))
    normalizer = _bytes(1, b"identity") + _number(4, 0) + _number(5, 1)
    return with_dummy_prefix(
        b"".join([*parts, _bytes(2, trainer), _bytes(3, normalizer)]), add_dummy_prefix
    )


def with_dummy_prefix(model: bytes, add_dummy_prefix: bool) -> bytes:
    """The same model with or without a space put before each text.

    A protocol buffer may be changed by appending to it: the last value of a field counts.
    """
    return model + _bytes(3, _number(3, int(add_dummy_prefix)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

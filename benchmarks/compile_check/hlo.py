"""What a compiled program says about its communication and its kernels, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_OPS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_INSTRUCTION = re.compile(rf"= (?P<shapes>.*?) (?P<op>{_OPS})(?:-start)?\(")
_SHAPE = re.compile(r"([a-z]+)(\d+)[a-z0-9]*\[([\d,]*)\]")
_OPCODE = re.compile(r" = (?:\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(")
#: Instructions that no device runs.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
_ORIGIN = re.compile(r'op_name="([^"]*)"')
#: What each layer is run by, in the names that the step's operations carry.
_LAYER = "/jit(_run_layer)/"


@dataclass(frozen=True, slots=True)
class Collective:
    """One exchange between devices.

    Attributes:
        op: such as "all-reduce".
        in_layer: whether a layer does it: each of them where the place is in a loop over them.
        num_bytes: of its result, on one device.
    """

    op: str
    in_layer: bool
    num_bytes: int


def collectives(text: str) -> Iterator[Collective]:
    """Every exchange of a program, once for each place it stands at."""
    for line in text.splitlines():
        if found := _INSTRUCTION.search(line):
            origin = _ORIGIN.search(line)
            in_layer = origin is not None and _LAYER in origin[1]
            yield Collective(found["op"], in_layer, _bytes(found["shapes"]))


def kernels(text: str, scope: str) -> int:
    """Instructions that a program outside of loops has in a named scope, each a kernel on a GPU.

    With those of no scope, such as copies: XLA adds them.
    """
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    found = 0
    for line in entry.splitlines():
        opcode, origin = _OPCODE.search(line), _ORIGIN.search(line)
        is_kernel = opcode is not None and opcode[1] not in _FREE
        found += is_kernel and (origin is None or f"/{scope}/" in origin[1])
    return found


def _bytes(shapes: str) -> int:
    """The largest of the shapes: a started exchange has its operand beside its result."""
    sizes = [
        math.prod(int(size) for size in dims.split(",") if size) * int(bits) // 8
        for _, bits, dims in _SHAPE.findall(shapes)
    ]
    return max(sizes, default=0)

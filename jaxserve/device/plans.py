"""A step's device calls as one array of bytes: what host 0 broadcasts to the other hosts.

Each call is the number of its program (an int32, in the order in which every host compiles them)
and then its inputs' bytes, whose shapes the program tells. A step is its changes of state, in
order, and then its program.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

#: A program's key, and what the host gives it: a tree of arrays.
Call = tuple[Hashable, Any]

_NUMBER = np.dtype(np.int32)


class PlanLayout:
    """Packs calls, and takes them apart again.

    Args:
        inputs: of each program, by key: a tree of arrays or of their shapes.
    """

    def __init__(self, inputs: Mapping[Hashable, Any]) -> None:
        self._keys = list(inputs)
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        self._trees = {key: jax.tree.flatten(tree) for key, tree in inputs.items()}

    def describe(self) -> list[str]:
        """Names and shapes, which must be the same on every host."""
        return [
            f"{key}: {', '.join(f'{x.dtype}{list(x.shape)}' for x in leaves)}"
            for key, (leaves, _) in self._trees.items()
        ]

    def pack(self, calls: Sequence[Call]) -> memoryview:
        """The calls, in order."""
        parts = []
        for key, inputs in calls:
            parts.append(np.array([self._numbers[key]], _NUMBER))
            parts += (np.ascontiguousarray(x) for x in jax.tree.leaves(inputs))
        return memoryview(b"".join(part.tobytes() for part in parts))

    def unpack(self, packed: bytes) -> list[Call]:
        """The calls again.

        Raises:
            ValueError: the bytes are not whole calls of these programs.
        """
        calls: list[Call] = []
        place = 0

        def take(shape: Sequence[int], dtype: Any) -> np.ndarray:
            nonlocal place
            count = int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(packed, dtype, count, place).reshape(shape)
            place += array.nbytes
            return array

        while place < len(packed):
            number = int(take((1,), _NUMBER)[0])
            if not 0 <= number < len(self._keys):
                raise ValueError(f"there is no program {number}")
            key = self._keys[number]
            leaves, structure = self._trees[key]
            arrays = [take(leaf.shape, leaf.dtype) for leaf in leaves]
            calls.append((key, jax.tree.unflatten(structure, arrays)))
        return calls

"""Numbers of kernels that only a measurement on the chip can decide.

`<op>/tunables.py` declares them, a frozen dataclass of integers a kernel, whose defaults run on
every chip that the kernel is for. `<op>/tuned/<chip>.json` says what was measured to be best on one
(`python -m benchmarks.tune`), and is found by what JAX calls the devices that are traced for. On a
chip without such a file the defaults hold.

    {"kinds": ["NVIDIA H100 80GB HBM3"],
     "kernels": {"gpu_decode": {"chosen": {"span": 64, …}, "measured": [ … ]}}}

`chosen` is all that is read here; `measured` is where it comes from, for people.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax


class Limits(NamedTuple):
    """What a number may be, and which values are worth a measurement."""

    least: int
    most: int
    multiple: int
    tried: tuple[int, ...]


def tunable(
    default: int, *, least: int, most: int, multiple: int = 1, tried: tuple[int, ...] = ()
) -> Any:
    """A field of `Tunables`."""
    limits = Limits(least, most, multiple, tuple(dict.fromkeys((default, *tried))))
    return field(default=default, metadata={"limits": limits})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunables:
    """Of one kernel.

    Attributes:
        OP, KERNEL: the operation's folder, and the kernel's file in it, which begins with the
            platform that it is for.

    Raises:
        ValueError: a number outside of its limits, or numbers that do not go together.
    """

    OP: ClassVar[str]
    KERNEL: ClassVar[str]

    def __post_init__(self) -> None:
        for each in fields(self):
            value, limits = getattr(self, each.name), each.metadata["limits"]
            if type(value) is not int or not limits.least <= value <= limits.most:
                wanted = f"from {limits.least} to {limits.most}"
            elif value % limits.multiple:
                wanted = f"a multiple of {limits.multiple}"
            else:
                continue
            raise ValueError(f"{self.OP} {self.KERNEL}: {each.name}={value!r}: give one {wanted}")
        if problem := self.problem():
            raise ValueError(f"{self.OP} {self.KERNEL}: {problem}")

    def problem(self) -> str | None:
        """Why the numbers do not go together; None where they do."""
        return None

    @classmethod
    def candidates(cls) -> Iterator[Self]:
        """All that are worth a measurement, the defaults first."""
        names = [each.name for each in fields(cls)]
        tried = [each.metadata["limits"].tried for each in fields(cls)]
        for values in itertools.product(*tried):
            try:
                yield cls(**dict(zip(names, values, strict=True)))
            except ValueError:  # these do not go together
                continue


#: What a benchmark has put in the place of what is chosen.
_trying: ContextVar[tuple[Tunables, ...]] = ContextVar("trying", default=())


@contextmanager
def trying(*given: Tunables) -> Iterator[None]:
    """What is traced inside has these numbers; functions compiled before keep theirs."""
    token = _trying.set((*given, *_trying.get()))
    try:
        yield
    finally:
        _trying.reset(token)


def tuned[T: Tunables](kind: type[T]) -> T:
    """A kernel's numbers on the devices that are traced for.

    Raises:
        ValueError: a file of numbers that the kernel cannot have.
    """
    for given in _trying.get():
        if isinstance(given, kind):
            return given
    path = _files(kind.OP).get(device_kind())
    return kind() if path is None else read(path, kind)


def device_kind() -> str:
    """What JAX calls the devices that are traced for: the mesh's where there is one, else its own.

    `jax.sharding.use_abstract_mesh` says it where a program is compiled ahead of time.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


@functools.cache
def read[T: Tunables](path: Path, kind: type[T]) -> T:
    """What a file chooses for a kernel; the defaults where it has nothing on it.

    Raises:
        ValueError: numbers that the kernel does not have, or cannot have.
    """
    kernels = json.loads(path.read_text())["kernels"]
    chosen = kernels.get(kind.KERNEL, {}).get("chosen", {})
    unknown = sorted(set(chosen) - {each.name for each in fields(kind)})
    if unknown:
        raise ValueError(f"{path}: {kind.KERNEL} has no {', '.join(unknown)}")
    try:
        return kind(**chosen)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@functools.cache
def _files(op: str) -> dict[str, Path]:
    """The operation's files, by the kinds of devices that they are for."""
    folder = Path(str(resources.files("pallas_kernels"))) / op / "tuned"
    return {
        kind: path
        for path in sorted(folder.glob("*.json"))
        for kind in json.loads(path.read_text())["kinds"]
    }

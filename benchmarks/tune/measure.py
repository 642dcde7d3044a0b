"""One kernel with each of its candidates: compiled, held against the reference, timed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu_check.kernels import TOLERANCE, error_of
from benchmarks.gpu_check.limits import seconds_a_call
from pallas_kernels.tuning import Tunables, trying

#: What another candidate must gain over the defaults before it is taken.
LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel at its main shape.

    Attributes:
        kind: whose numbers are looked for.
        where: the shape, in words.
        make: what `run` takes; traced only, where there is no device.
        run: the kernel.
        error: of small fresh inputs against the reference, ‖out − ref‖/‖ref‖.
    """

    kind: type[Tunables]
    where: str
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    error: Callable[[], float]


class Target(NamedTuple):
    """What is compiled for where it is not at hand, as `compile_check` has it."""

    mesh: Any
    platforms: tuple[str, ...]
    compile: Callable[[Any, Any], Any]


@dataclass(slots=True)
class Outcome:
    """Of one candidate.

    Attributes:
        problem: why it does not count; "" where it does.
        us: microseconds a call; NaN where it was not timed.
    """

    tunables: Tunables
    problem: str = ""
    error: float = math.nan
    us: float = math.nan

    def line(self) -> str:
        """Of the table."""
        values = " ".join(f"{name}={value}" for name, value in asdict(self.tunables).items())
        timed = f"{self.us:.1f} µs, error {self.error:.5f}"
        return f"{values}: {self.problem or ('compiles' if math.isnan(self.us) else timed)}"

    def as_dict(self) -> dict[str, Any]:
        """For the file."""
        found = {"values": asdict(self.tunables)}
        if self.problem:
            return found | {"problem": self.problem}
        return found | {"us": round(self.us, 1), "error": round(self.error, 5)}


def measure(
    case: Case,
    candidates: Iterable[Tunables] | None = None,
    seconds: Callable[..., float] = seconds_a_call,
    target: Target | None = None,
) -> Iterator[Outcome]:
    """Each candidate's outcome, as it is known.

    Args:
        candidates: the kind's own by default.
        seconds: a call of a function with arguments.
        target: only compiles, for this.
    """
    arguments = case.make() if target is None else _abstract(case.make, target)
    platforms, aimed = None, nullcontext
    if target is not None:
        platforms = target.platforms
        aimed = lambda: jax.sharding.use_abstract_mesh(target.mesh.abstract_mesh)  # noqa: E731
    programs: set[tuple[str, str]] = set()
    agreed = None
    for tunables in case.kind.candidates() if candidates is None else candidates:
        outcome = Outcome(tunables)
        try:
            with trying(tunables), aimed():
                # A function of its own: JAX keeps what it traced of each.
                traced = jax.jit(lambda *given: case.run(*given)).trace(*arguments)
                lowered = traced.lower(lowering_platforms=platforms)
                # A program alone does not tell where a kernel is interpreted.
                program = str(traced.jaxpr), lowered.as_text()
                if program in programs:
                    outcome.problem = "the same program as one before"
                elif target is not None:
                    target.compile(lowered, target.mesh.devices.flat[0])
                else:
                    run = lowered.compile()
                    out = jax.block_until_ready(run(*arguments))
                    outcome.error = case.error()
                    if agreed is not None:  # this shape is too large for the reference
                        apart = map(error_of, jax.tree.leaves(out), jax.tree.leaves(agreed))
                        outcome.error = max(outcome.error, *apart)
                    if outcome.error < TOLERANCE:
                        agreed = out if agreed is None else agreed
                        outcome.us = 1e6 * seconds(run, *arguments)
                    else:
                        outcome.problem = f"wrong: error {outcome.error:.3g}"
                programs.add(program)
        except Exception as error:  # whatever a candidate dies of is its verdict
            outcome.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield outcome


def best(outcomes: Iterable[Outcome], kind: type[Tunables]) -> Outcome | None:
    """The fastest that counts, or the defaults where nothing is faster by LEAST_GAIN."""
    counted = [outcome for outcome in outcomes if not outcome.problem]
    fastest = min(counted, key=lambda outcome: outcome.us, default=None)
    default = next((outcome for outcome in counted if outcome.tunables == kind()), None)
    if fastest and default and fastest.us > (1 - LEAST_GAIN) * default.us:
        return default
    return fastest


def write(path: Path, kinds: list[str], chosen: Tunables, run: dict[str, Any]) -> None:
    """Puts a choice and where it comes from into a chip's file, in front of earlier runs.

    Args:
        kinds: what JAX calls the chip's devices.
        run: date, device, versions, commit, where and candidates.
    """
    held = json.loads(path.read_text()) if path.exists() else {"kinds": kinds, "kernels": {}}
    earlier = held["kernels"].get(chosen.KERNEL, {}).get("measured", [])
    held["kernels"][chosen.KERNEL] = {"chosen": asdict(chosen), "measured": [run, *earlier]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(held, indent=2) + "\n")


def _abstract(make: Callable[[], tuple[Any, ...]], target: Target) -> Any:
    place = SingleDeviceSharding(target.mesh.devices.flat[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(make)
    )

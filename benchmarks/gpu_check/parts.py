"""A part's checks, in processes that may die or hang: what was found before is kept.

A kernel that is wrong can hang the device or end its process. So a part's process says on stdout,
one JSON line each, which check it begins and what the check found; this side kills the process
where a check takes too long, and starts another from the check behind it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_check.report import Finding

#: Processes that share the checks that are not timed, and the memory of each.
SHARES, _MEMORY = 4, 0.2


@dataclass(frozen=True, slots=True)
class Check:
    """One of a part's.

    Attributes:
        find: what is done.
        timed: whether it wants the device for itself.
    """

    name: str
    find: Callable[[], Iterable[Finding]]
    timed: bool = False


@dataclass(slots=True)
class Result:
    """What a part found.

    Attributes:
        failed: what went wrong, by the check that it went wrong in.
        seconds: that each check took.
    """

    findings: list[Finding] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def perform(checks: Iterable[Check], first: int) -> None:
    """In the part's process: every check from a number on, told on stdout, until one fails.

    What went wrong in one may be an error of the device, which all later ones would meet too.

    Args:
        first: how many to leave out.
    """
    for index, check in enumerate(checks):
        if index < first:
            continue
        _tell(check=check.name, index=index)
        try:
            _tell(found=[dataclasses.asdict(finding) for finding in check.find()])
        except Exception as error:  # whatever it is, the next process goes on behind it
            traceback.print_exc()
            _tell(failed=f"{type(error).__name__}: {error}"[:500])
            return
    _tell(through=True)


def _tell(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def share_of(checks: Iterable[Check], share: str) -> list[Check]:
    """Those of one process: "timed", or the number of a share of the others."""
    checks = list(checks)
    if share == "timed":
        return [check for check in checks if check.timed]
    return [check for check in checks if not check.timed][int(share) :: SHARES]


def run(command: list[str], patience: float, total: float, *, shared: bool) -> Result:
    """A part's processes: first those that share what is not timed, then the other.

    Args:
        command: of a process, which takes `--share` and `--first N`.
        patience: seconds for one check, and for coming up.
        total: seconds for all.
        shared: whether there are checks that are not timed.
    """
    ends = time.monotonic() + total
    with ThreadPoolExecutor(SHARES) as pool:
        futures = [
            pool.submit(_share, [*command, "--share", str(index)], _MEMORY, patience, ends)
            for index in range(SHARES if shared else 0)
        ]
        results = [future.result() for future in futures]
    results.append(_share([*command, "--share", "timed"], 0.92, patience, ends))
    return Result(
        findings=[finding for result in results for finding in result.findings],
        failed={name: why for result in results for name, why in result.failed.items()},
        seconds={name: spent for result in results for name, spent in result.seconds.items()},
    )


def _share(command: list[str], memory: float, patience: float, ends: float) -> Result:
    """One share, in as many processes as it takes."""
    result, first, is_through = Result(), 0, False
    while not is_through:
        process = subprocess.Popen(
            [*command, "--first", str(first)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": str(memory)},
        )
        begun: list[tuple[str, int]] = []
        lines = _reader(process)
        try:
            is_through = _listen(lines, patience, ends, begun, result)
        except _ItStopped as why:
            name, _ = begun[-1] if begun else ("coming up", -1)
            result.failed[name] = str(why)
        finally:
            process.kill()
            while lines.get():
                pass
        if not begun or time.monotonic() >= ends:
            break
        first = begun[-1][1] + 1
    return result


class _ItStopped(Exception):
    """A process ended, or nothing was heard of it for too long."""


def _listen(
    lines: queue.SimpleQueue[str],
    patience: float,
    ends: float,
    begun: list[tuple[str, int]],
    result: Result,
) -> bool:
    """Hears a process out; whether it is through all its checks.

    Args:
        lines: that it prints, and an empty one behind them.
        begun: gets the names and numbers of the checks that it began.

    Raises:
        _ItStopped: in the midst of the last of those, or in front of the first.
    """
    since = time.monotonic()
    while line := _next(lines, min(since + patience, ends)):
        told = _message(line)
        if "check" in told:
            begun.append((told["check"], told["index"]))
        elif "through" in told:
            return True
        elif "found" in told or "failed" in told:
            name = begun[-1][0]
            result.findings += [Finding(**found) for found in told.get("found", ())]
            result.seconds[name] = round(time.monotonic() - since, 1)
            if "failed" in told:
                result.failed[name] = told["failed"]
                return False
        since = time.monotonic()
    lines.put("")
    raise _ItStopped("its process ended")


def _message(line: str) -> dict[str, Any]:
    """A line of JSON; empty for anything else that a library may print."""
    try:
        told = json.loads(line)
    except ValueError:
        told = None
    if isinstance(told, dict):
        return told
    print(line, end="", file=sys.stderr)
    return {}


def _reader(process: subprocess.Popen[str]) -> queue.SimpleQueue[str]:
    """What the process prints, and an empty line behind it."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        process.wait()
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def _next(lines: queue.SimpleQueue[str], until: float) -> str:
    """The next line.

    Raises:
        _ItStopped: none came in time.
    """
    start = time.monotonic()
    try:
        return lines.get(timeout=max(0.01, until - start))
    except queue.Empty:
        raise _ItStopped(f"not done after {time.monotonic() - start:.0f} s") from None

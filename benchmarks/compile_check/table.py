"""The table of compiled steps in docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.compile_check.check import Result
from benchmarks.compile_check.steps import ROWS_OF_STEPS

_PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
_BEGIN, _END = "<!-- compile_check -->", "<!-- /compile_check -->"
_HEAD = (
    "| step | chips | attention | weights, GB | cache, GB | temporary, MB | "
    "exchanges in a layer, bytes |\n"
    "|---|---|---|---|---|---|---|\n"
)


def write_table(results: Iterable[Result], page: Path = _PAGE) -> None:
    """Puts whole steps between the marks of the page; rows that were not run stay as they are."""
    before, lines, after = _read(page)
    lines |= {_key(line): line for line in map(_line, filter(_is_step, results))}
    table = "".join(lines[row.name] for row in ROWS_OF_STEPS if row.name in lines)
    page.write_text(f"{before}{_BEGIN}\n\n{_HEAD}{table}\n{_END}{after}")


def missing_steps(page: Path = _PAGE) -> set[str]:
    """Names of the whole steps that the page has no row of."""
    return {row.name for row in ROWS_OF_STEPS} - set(_read(page)[1])


def _read(page: Path) -> tuple[str, dict[str, str], str]:
    """What stands before the table, its lines by their rows' names, and what stands behind it."""
    before, _, rest = page.read_text().partition(_BEGIN)
    inside, _, after = rest.partition(_END)
    lines = [line for line in inside.splitlines(keepends=True) if line.startswith("| ")]
    return before, {_key(line): line for line in lines}, after


def _key(line: str) -> str:
    """Name of a line's row."""
    step, slice = (cell.strip() for cell in line.split("|")[1:3])
    model, _, kind = step.partition(", ")
    return f"{model}/{slice}/{kind}"


def _is_step(result: Result) -> bool:
    return result.name.endswith(("/decode", "/prefill"))


def _line(result: Result) -> str:
    model, slice, kind = result.name.split("/")
    if result.verdict != "compiles":
        what = [f"{result.verdict}: {result.detail}", "", "", "", ""]
    else:
        what = [
            result.attention,
            f"{result.weights_bytes / 1e9:.2f}",
            f"{result.cache_bytes / 1e9:.2f}",
            f"{result.temp_bytes / 1e6:.0f}",
            ", ".join(result.in_layer) or "none",
        ]
    return f"| {model}, {kind} | {slice} | {' | '.join(what)} |\n"

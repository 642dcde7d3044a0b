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
    text = page.read_text()
    before, _, rest = text.partition(_BEGIN)
    inside, _, after = rest.partition(_END)
    lines = {_key(line): line for line in inside.splitlines(keepends=True) if line.startswith("| ")}
    lines |= {_key(line): line for line in map(_line, filter(_is_step, results))}
    names = [row.name.split("/") for row in ROWS_OF_STEPS]
    order = [(f"{model}, {kind}", slice) for model, slice, kind in names]
    table = "".join(lines[key] for key in order if key in lines)
    page.write_text(f"{before}{_BEGIN}\n\n{_HEAD}{table}\n{_END}{after}")


def _key(line: str) -> tuple[str, ...]:
    """Step and chips of a line."""
    return tuple(cell.strip() for cell in line.split("|")[1:3])


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

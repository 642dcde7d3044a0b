"""The table of compiled steps in docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.compile_check.check import Result

_PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
_BEGIN, _END = "<!-- compile_check -->", "<!-- /compile_check -->"
_HEAD = (
    "| step | chips | attention | weights, GB | cache, GB | temporary, MB | "
    "exchanges in a layer, bytes |\n"
    "|---|---|---|---|---|---|---|\n"
)


def write_table(results: Iterable[Result]) -> None:
    """Replaces what stands between the marks of the page; whole steps only."""
    lines = [_line(result) for result in results if _is_step(result)]
    page = _PAGE.read_text()
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _PAGE.write_text(f"{before}{_BEGIN}\n\n{_HEAD}{''.join(lines)}\n{_END}{after}")


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

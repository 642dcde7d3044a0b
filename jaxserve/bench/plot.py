"""Grouped bars as an SVG file, by hand: no plotting library is needed to build the docs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

COLORS = ("#1f77b4", "#ff7f0e", "#ffbb78", "#2ca02c", "#98df8a", "#9467bd", "#c5b0d5", "#8c564b")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 860, 400, 56, 48, 80
LEGEND_COLUMNS = 4


def grouped_bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    unit: str,
    shown: str = ".0f",
) -> str:
    """An SVG document.

    Args:
        series: name and one value a group; None leaves the place empty.
        shown: how a bar's value is written.
    """
    largest = max((v for _, values in series for v in values if v is not None), default=1.0)
    step = _nice_step(largest)
    top = step * math.ceil(largest / step)
    scale = (HEIGHT - TOP - BOTTOM) / top
    base = HEIGHT - BOTTOM
    group_width = (WIDTH - LEFT - 12) / len(groups)
    bar_width = group_width * 0.84 / len(series)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="38" fill="#555">{escape(unit)}</text>',
    ]
    for line in range(round(top / step) + 1):
        y = base - line * step * scale
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{line * step:g}</text>')
    for place, group in enumerate(groups):
        left = LEFT + place * group_width
        middle = left + group_width / 2
        out.append(
            f'<text x="{middle:.1f}" y="{base + 18}" text-anchor="middle">{escape(group)}</text>'
        )
        for index, (name, values) in enumerate(series):
            value = values[place]
            if value is None:
                continue
            x = left + group_width * 0.08 + index * bar_width
            height = value * scale
            out.append(
                f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{bar_width * 0.92:.1f}" '
                f'height="{height:.1f}" fill="{COLORS[index % len(COLORS)]}">'
                f"<title>{escape(name)}, {escape(group)}: {value:{shown}}</title></rect>"
            )
    for index, (name, _) in enumerate(series):
        row, column = divmod(index, LEGEND_COLUMNS)
        x = LEFT + column * (WIDTH - LEFT) / LEGEND_COLUMNS
        y = base + 44 + 18 * row
        color = COLORS[index % len(COLORS)]
        out.append(f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{color}"/>')
        out.append(f'<text x="{x + 14:.1f}" y="{y}" font-size="10.5">{escape(name)}</text>')
    return "\n".join([*out, "</svg>\n"])


def _nice_step(largest: float) -> float:
    """A step of 1, 2 or 5 times a power of ten that gives four to ten lines."""
    power = 10 ** math.floor(math.log10(largest / 4))
    return next(power * n for n in (1, 2, 5, 10) if largest / (power * n) <= 10)

"""The losses of a run as an SVG file, by hand: training needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 16, 48, 44
_RAW, _SMOOTH, _HELD_OUT = "#c6d9ea", "#1f77b4", "#d62728"
#: Points of a line: more than the eye tells apart, few enough for a small file.
_MAX_POINTS = 1000
#: How much of the smooth line a new value is.
_NEW = 0.1

Point = tuple[int, float]


def loss_plot(title: str, losses: Sequence[Point], held_out: Sequence[Point]) -> str:
    """An SVG document.

    Args:
        losses: step and loss of every update; at least one.
        held_out: likewise, of each evaluation.
    """
    every = [value for _, value in (*losses, *held_out) if math.isfinite(value)] or [0.0]
    low, high = min(every), max(every)
    step = _nice_step((high - low) or 1.0)
    bottom, top = step * math.floor(low / step), step * math.ceil(high / step)
    top = top if top > bottom else bottom + step
    last = max(index for index, _ in losses)

    def x(index: float) -> float:
        return LEFT + index / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    def line(points: Sequence[Point], color: str, width: float) -> str:
        places = " ".join(
            f"{x(i):.1f},{y(value):.1f}" for i, value in _thinned(points) if math.isfinite(value)
        )
        return (
            f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'
        )

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="38" fill="#555">loss, nats a token</text>',
    ]
    for tick in range(round((top - bottom) / step) + 1):
        value = bottom + tick * step
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            'stroke="#ddd"/>'
        )
        out.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    across = max(1, round(_nice_step(last)))
    out += [
        f'<text x="{x(index):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{index}</text>'
        for index in range(0, last + 1, across)
    ]
    out.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="#555">step</text>'
    )
    out += [line(losses, _RAW, 1), line(_smooth(losses), _SMOOTH, 2)]
    names = [("training, smoothed", _SMOOTH)]
    if held_out:
        out.append(line(held_out, _HELD_OUT, 2))
        out += [
            f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="3" fill="{_HELD_OUT}">'
            f"<title>step {i}: {value:.4f}</title></circle>"
            for i, value in held_out
            if math.isfinite(value)
        ]
        names.append(("held out", _HELD_OUT))
    for place, (name, color) in enumerate(names):
        out.append(
            f'<text x="{WIDTH - RIGHT}" y="{20 + 16 * place}" text-anchor="end" fill="{color}">'
            f"{escape(name)}</text>"
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def _smooth(points: Sequence[Point]) -> list[Point]:
    """An exponential mean, begun at the first value."""
    mean, smooth = points[0][1], []
    for index, value in points:
        mean += _NEW * (value - mean) if math.isfinite(value) else 0.0
        smooth.append((index, mean))
    return smooth


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    stride = -(-len(points) // _MAX_POINTS)
    return [*points[::stride], points[-1]] if stride > 1 else points


def _nice_step(size: float) -> float:
    """About a fifth of it: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size / 5)

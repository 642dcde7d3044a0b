"""The losses of a run as an SVG file, by hand: training needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 16, 48, 44
_RAW, _SMOOTH, _HELD_OUT = "#c6d9ea", "#1f77b4", "#d62728"
#: Points of a line: more than the eye tells apart, few enough for a small file.
_MAX_POINTS = 1000
#: How much of the smooth line a new value is.
_NEW = 0.1

Point = tuple[int, float]


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Steps from 0 to `last` across, losses from `bottom` to `top` upwards, a line each `step`."""

    last: int
    bottom: float
    top: float
    step: float

    @classmethod
    def around(cls, last: int, values: Sequence[float]) -> _Frame:
        """The smallest with round limits that holds the values."""
        low, high = min(values), max(values)
        step = _nice_step((high - low) or 1.0)
        bottom, top = step * math.floor(low / step), step * math.ceil(high / step)
        return cls(last=last, bottom=bottom, top=max(top, bottom + step), step=step)

    def x(self, index: float) -> float:
        return LEFT + index / self.last * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> list[str]:
        out = []
        for tick in range(round((self.top - self.bottom) / self.step) + 1):
            value = self.bottom + tick * self.step
            y = self.y(value)
            out.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            )
        out += [
            f'<text x="{self.x(index):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{index}</text>"
            for index in range(0, self.last + 1, max(1, round(_nice_step(self.last))))
        ]
        return [*out, _text(WIDTH - RIGHT, HEIGHT - 8, "step", "#555", "end")]

    def line(self, points: Sequence[Point], color: str, width: int) -> str:
        places = " ".join(
            f"{self.x(i):.1f},{self.y(value):.1f}"
            for i, value in _thinned(points)
            if math.isfinite(value)
        )
        return f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def loss_plot(title: str, losses: Sequence[Point], held_out: Sequence[Point]) -> str:
    """An SVG document.

    Args:
        losses: step and loss of every update; at least one.
        held_out: likewise, of each evaluation.
    """
    values = [value for _, value in (*losses, *held_out) if math.isfinite(value)]
    frame = _Frame.around(max(index for index, _ in losses), values or [0.0])
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
        _text(LEFT, 38, "loss, nats a token", "#555"),
        *frame.axes(),
        frame.line(losses, _RAW, 1),
        frame.line(_smooth(losses), _SMOOTH, 2),
        _text(WIDTH - RIGHT, 20, "training, smoothed", _SMOOTH, "end"),
    ]
    if held_out:
        out.append(frame.line(held_out, _HELD_OUT, 2))
        out += [
            f'<circle cx="{frame.x(i):.1f}" cy="{frame.y(value):.1f}" r="3" fill="{_HELD_OUT}">'
            f"<title>step {i}: {value:.4f}</title></circle>"
            for i, value in _thinned(held_out)
            if math.isfinite(value)
        ]
        out.append(_text(WIDTH - RIGHT, 36, "held out", _HELD_OUT, "end"))
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(x: int, y: int, text: str, color: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


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

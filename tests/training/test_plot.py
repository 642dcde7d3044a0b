"""The plot is an SVG in which every loss has its place."""

from __future__ import annotations

from xml.etree import ElementTree

from jaxserve.training.history import History
from jaxserve.training.plot import HEIGHT, LEFT, RIGHT, TOP, WIDTH, loss_plot

SVG = "{http://www.w3.org/2000/svg}"


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """Points of each line, in order: losses, smoothed, held out."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    pairs = [[point.split(",") for point in line.attrib["points"].split()] for line in found]
    return [[(float(x), float(y)) for x, y in line] for line in pairs]


def test_losses_stand_where_they_belong() -> None:
    raw, smooth = lines(loss_plot("a & b", [(0, 4.0), (5, 3.0), (10, 2.0)], []))
    assert raw == [(LEFT, TOP), ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - 44) / 2),
                   (WIDTH - RIGHT, HEIGHT - 44)]  # fmt: skip
    assert smooth[0] == raw[0] and smooth[1][1] < raw[1][1]


def test_held_out_losses_are_a_line_of_their_own() -> None:
    svg = loss_plot("run", [(1, 4.0), (2, 3.0)], [(0, 5.0), (2, 4.0)])
    assert len(lines(svg)) == 3 and len(lines(svg)[2]) == 2
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "held out" in texts and "training, smoothed" in texts and "5" in texts


def test_a_long_run_makes_a_small_file() -> None:
    losses = [(step, 1 / step) for step in range(1, 100_001)]
    svg = loss_plot("long", losses, [])
    assert len(svg) < 60_000 and len(lines(svg)[0]) <= 1002


def test_odd_values_do_no_harm() -> None:
    for losses in ([(1, 2.0)], [(1, 0.0), (2, 0.0)], [(1, 2.0), (2, float("nan")), (3, 1.0)]):
        assert "nan" not in loss_plot("odd", losses, [])


def test_a_history_is_the_same_after_json() -> None:
    history = History([(1, 0.1), (2, 1 / 3)], [(0, 2 / 3)])
    assert History.from_json(history.to_json()).to_json() == history.to_json()

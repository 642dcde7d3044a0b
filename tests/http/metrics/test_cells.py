"""The cells that workers share: one place for a series in all rows, bounded labels, no room."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxserve.http.metrics import cells as cells_module
from jaxserve.http.metrics.cells import MAX_LABEL, OTHER, Cells, create_shared


def shared(path: Path, workers: int) -> list[Cells]:
    """As the workers of a server see their file."""
    create_shared(path / "metrics", workers)
    return [Cells(path / "metrics", index) for index in range(workers)]


def test_workers_that_claim_in_any_order_agree_and_add_up(tmp_path: Path):
    first, second = shared(tmp_path, 2)
    a, b = first.claim("a", (), 1), first.claim("b", ("x",), 3)
    assert second.claim("b", ("x",), 3) == b
    c = second.claim("c", (), 1)
    assert len({*range(b, b + 3), a, c}) == 5
    first.own[b] += 2
    second.own[b] += 5
    second.own[b + 2] += 1
    first.refresh()
    (series,) = first.series("b")
    assert series.labels == ("x",)
    assert first.totals(series) == second.totals(series) == [7, 0, 1]
    assert first.largest(series) == 5
    assert [one.first for one in first.series("c")] == [c]


def test_many_that_claim_at_once_get_the_same_places(tmp_path: Path):
    workers = shared(tmp_path, 4)
    names = [f"series {number}" for number in range(300)]

    def claim(cells: Cells) -> dict[str, int]:
        order = random.Random(id(cells)).sample(names, len(names))
        return {name: cells.claim("n", (name,), 2) for name in order}

    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(claim, workers))
    assert all(found == places[0] for found in places)
    firsts = sorted(places[0].values())
    assert all(after - before == 2 for before, after in itertools.pairwise(firsts))


def test_ten_thousand_tenants_have_fifty_labels_and_one_for_the_rest(tmp_path: Path):
    """A tenant-label explosion, seen by two workers."""
    first, second = shared(tmp_path, 2)
    names = [f"tenant-{number}" for number in range(10_000)]
    shown = [
        (first, second)[number % 2].label("label:tenant", name, 50)
        for number, name in enumerate(names)
    ]
    assert shown[:50] == names[:50]
    assert set(shown[50:]) == {OTHER}
    assert [second.label("label:tenant", name, 50) for name in names[:60]] == shown[:60]
    assert first.label("label:adapter", "mine", 50) == "mine"  # each kind has its own bound
    assert first.label("label:none", "mine", 0) == OTHER


@pytest.mark.parametrize("value", ["a\0b", "\ud800", "x" * 500, "ä" * 300, "", 'q"\\\n'])
def test_any_name_is_a_label(value: str):
    cells = Cells()
    label = cells.label("label:tenant", value, 10)
    assert len(label) <= MAX_LABEL and "\0" not in label
    place = cells.claim("n", (label,), 1)
    assert cells.claim("n", (cells.label("label:tenant", value, 10),), 1) == place
    assert [series.labels for series in cells.series("n")] == [(label,)]


def test_series_without_room_are_counted_and_harm_no_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells_module, "ROW_CELLS", 128)
    cells = Cells()
    kept = [cells.claim("n", (str(number),), 10) for number in range(6)]
    lost = [cells.claim("n", (str(number),), 10) for number in range(6, 9)]
    assert lost == [0, 0, 0] and min(kept) >= 64
    assert cells.num_refused == 3
    assert cells.claim("n", ("7",), 10) == 0 and cells.num_refused == 3  # the same again
    cells.own[lost[0]] += 99
    assert all(cells.totals(series) == [0] * 10 for series in cells.series("n"))
    assert cells.claim("n", ("2",), 10) == kept[2]


def test_a_directory_without_room_gives_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cells_module, "DIRECTORY_BYTES", 256)
    cells = Cells()
    shown = [cells.label("label:tenant", f"tenant-{number}", 1000) for number in range(20)]
    assert shown[0] == "tenant-0" and shown[-1] == OTHER
    assert cells.num_refused > 0

"""When sequences were set back or parked, and when they ran again, counted in turns."""

from __future__ import annotations

import pytest

from jaxserve.scheduler.sequence import AdapterUse, SequenceState, Wait
from tests.fakes.rig import Rig

RUNNING = (SequenceState.PREFILLING, SequenceState.DECODING, SequenceState.RETIRED)


def run(rig: Rig, now: list[int], state: SequenceState) -> list[tuple[int, int]]:
    """Turns to the end; for the last sequence, the turns in which it came into a state and left."""
    watched = rig.sequences[-1]
    spells: list[tuple[int, int]] = []
    began = 0
    while rig.scheduler.has_work:
        now[0] += 1
        rig.turn()
        if watched.state is state and (watched.num_preemptions or watched.adapter) and not began:
            began = now[0]
        elif began and watched.state in RUNNING:
            spells.append((began, now[0]))
            began = 0
    return spells


@pytest.mark.parametrize(("host_pages", "kind"), [(0, "preempted"), (20, "swapped")])
def test_a_preemption_lasts_until_it_runs_again(host_pages: int, kind: str) -> None:
    now = [0]
    rig = Rig(
        pages=11, max_rows=2, decode_steps=1, host_pages=host_pages, prefix=False,
        clock_ns=lambda: now[0],
    )  # fmt: skip
    for token in (7, 8):
        rig.submit([token] * 4, max_tokens=24, ignore_eos=True)
    ((start, end),) = run(rig, now, SequenceState.WAITING)
    old, young = rig.sequences
    assert end - start > 3
    assert old.waits == [] and young.waits == [Wait(kind, start, end)]


def test_a_parked_sequence_waits_for_its_adapter_s_slot() -> None:
    now = [0]
    rig = Rig(adapter_slots=(1,), clock_ns=lambda: now[0])
    for number in (1, 2):
        use = AdapterUse(key=f"{number:032x}", rank_class=0)
        rig.submit([1, 2, 3], adapter=use, ignore_eos=True)
    ((start, end),) = run(rig, now, SequenceState.PARKED)
    first, second = rig.sequences
    assert first.waits == [] and second.waits == [Wait("adapter", start, end)]
    assert end - start > 3

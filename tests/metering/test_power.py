"""Energy: from counters that wrap, stop, fail and lie, else modelled, and it is said which."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import pytest

from jaxserve.config import MeteringConfig
from jaxserve.errors import ConfigError
from jaxserve.metering.hours import Interval
from jaxserve.metering.power.counters import Counter, nvml_counters, rapl_counters
from jaxserve.metering.power.modelled import DEVICES
from jaxserve.metering.power.power import Power, make_power

S = 10**9


class Joules:
    """A counter whose value a test sets."""

    def __init__(self) -> None:
        self.value = 0.0

    def __call__(self) -> float:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def interval(start_s: float, end_s: float, busy_s: float = 0.0) -> Interval:
    return Interval(start_ns=int(start_s * S), end_ns=int(end_s * S), busy_ns=int(busy_s * S))


def measuring(idle_w: float = 10, busy_w: float = 100) -> tuple[Power, Joules]:
    joules = Joules()
    return Power([Counter("nvml:0", joules)], idle_w, busy_w), joules


def test_a_counter_adds_up_wraps_and_is_reset():
    joules = Joules()
    counter = Counter("x", joules, wrap_j=1000)
    values = [600.0, 700.0, 900.0, 50.0, 60.0, 10.0, 20.0]
    added = []
    for joules.value in values:
        added.append(counter.added_j())
    # 900 → 50 wrapped; 60 → 10 is a reset: what it took meanwhile is not known
    assert added == [None, 100, 200, 150, 10, None, 10]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, OSError("gone"), ValueError("x")])
def test_a_counter_that_says_no_number_adds_nothing_and_comes_back(bad):
    joules = Joules()
    counter = Counter("x", joules)
    added = []
    for joules.value in [1.0, 3.0, bad, 7.0, 9.0]:
        added.append(counter.added_j())
    assert added == [None, 2, None, None, 2]


def test_measured_energy_is_what_the_counter_says_and_idle_takes_idle_power():
    power, joules = measuring()
    for second in range(11):
        joules.value = 50.0 * second
        power.read(second * S)
    energy_j, busy_j = power.measure(interval(2, 8, busy_s=3))
    assert energy_j == pytest.approx(300)
    assert busy_j == pytest.approx(300 - 10 * 3)
    assert power.source == "nvml" and power.modelled_s == 0
    assert power.watts == pytest.approx(50)


def test_short_windows_that_read_nothing_are_made_longer():
    """A counter that moves every four seconds only: the readings between say 0 J."""
    power, joules = measuring()
    for tenth in range(121):
        joules.value = 200.0 * (tenth // 40)
        power.read(tenth * S // 10)
    energy_j, _ = power.measure(interval(0, 12))
    assert energy_j == pytest.approx(600, rel=0.01)
    assert power.modelled_s == 0


def test_a_counter_that_stands_still_is_replaced_by_the_model():
    power, joules = measuring()
    joules.value = 5.0
    for second in range(25):
        power.read(second * S)
    assert power.source == "modelled"
    energy_j, busy_j = power.measure(interval(0, 20, busy_s=10))
    assert energy_j == pytest.approx(20 * 10 + 10 * 90)
    assert busy_j == pytest.approx(10 * 100)
    assert power.modelled_s == pytest.approx(20)


def test_a_counter_that_fails_for_a_while_is_modelled_just_then():
    power, joules = measuring()
    for second in range(31):
        joules.value = OSError("gone") if 10 <= second < 20 else 50.0 * second
        power.read(second * S)
        if second == 15:
            assert power.source == "modelled"
    assert power.source == "nvml"
    energy_j, _ = power.measure(interval(0, 30))
    # measured to 9 s and from 20 s on, when the counter was first read again
    assert power.modelled_s == pytest.approx(11)
    assert energy_j == pytest.approx(50 * 19 + 10 * 11)


def test_more_than_any_machine_takes_is_no_reading():
    power, joules = measuring()
    for second in range(14):
        joules.value = 1e12 * second
        power.read(second * S)
    assert power.source == "modelled"
    assert power.measure(interval(0, 10))[0] == pytest.approx(100)


def test_without_a_sensor_power_is_modelled_by_use():
    power = make_power(MeteringConfig(power="modelled", device="h100", devices=2))
    power.read(0)
    idle_w, busy_w = 2 * DEVICES["h100"].idle_w, 2 * DEVICES["h100"].busy_w
    energy_j, busy_j = power.measure(interval(0, 10, busy_s=4))
    assert energy_j == pytest.approx(10 * idle_w + 4 * (busy_w - idle_w))
    assert busy_j == pytest.approx(4 * busy_w)
    assert power.source == "modelled" and power.modelled_s == 10


def test_a_constant_is_both_watts_alike():
    power = make_power(MeteringConfig(power="modelled", idle_watts=200, busy_watts=200, devices=4))
    assert power.measure(interval(0, 10, busy_s=7)) == pytest.approx((8000, 5600))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "h1000"}, "h100"),
        ({"idle_watts": 300, "busy_watts": 200}, "busy_watts"),
        ({"power": "nvml", "gpus": ("x",)}, "gpus"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        make_power(MeteringConfig(**settings))


def test_rapl_counts_packages_and_leaves_out_what_cannot_be_read(tmp_path: Path):
    for name, microjoules in (("intel-rapl:0", 5_000_000), ("intel-rapl:1", 7_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{microjoules}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    (tmp_path / "intel-rapl:0:0").mkdir()  # a part of a package
    (tmp_path / "intel-rapl:2").mkdir()  # not for us
    counters = rapl_counters(tmp_path)
    assert [counter.name for counter in counters] == ["intel-rapl:0", "intel-rapl:1"]
    assert counters[0].added_j() is None
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9000000\n")
    assert counters[0].added_j() == pytest.approx(4)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")  # wrapped
    assert counters[0].added_j() == pytest.approx(2)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert counters[0].added_j() is None
    assert rapl_counters(tmp_path / "none") == []


def test_nvml_reads_the_gpus_that_are_meant(monkeypatch: pytest.MonkeyPatch):
    class NVMLError(Exception):
        pass

    millijoules = {0: 1000.0, 1: 2000.0, 2: NVMLError("not supported")}

    def energy(handle: int) -> float:
        value = millijoules[handle]
        if isinstance(value, Exception):
            raise value
        return value

    fake = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert [counter.name for counter in nvml_counters()] == ["nvml:0", "nvml:1"]
    (counter,) = nvml_counters([1])
    assert counter.added_j() is None
    millijoules[1] = 5500.0
    assert counter.added_j() == pytest.approx(3.5)
    millijoules[1] = NVMLError("the GPU has fallen off the bus")
    assert counter.added_j() is None


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(nvmlInit=fail))
    assert nvml_counters() == []

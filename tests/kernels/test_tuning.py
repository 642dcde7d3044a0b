"""Numbers of kernels: their limits, and which file they come from on which chip."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import tuning
from pallas_kernels.grouped_matmul.gpu_plan import make_plan
from pallas_kernels.grouped_matmul.tunables import GpuGrouped
from pallas_kernels.paged_attention.gpu_decode import ring_shape
from pallas_kernels.paged_attention.tunables import GpuChunks, GpuDecode, TpuDecode
from pallas_kernels.quant_matmul.tunables import GpuInt4
from pallas_kernels.tuning import Tunables, device_kind, read, trying, tuned

H100 = "NVIDIA H100 80GB HBM3"


def on(kind: str) -> Any:
    """What is traced inside is for such devices."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (GpuDecode, {"span": 192}, "span=192: give one from 64 to 128"),
        (GpuDecode, {"span": 96}, "span=96: give one a multiple of 64"),
        (GpuDecode, {"span": 64.0}, "span=64.0: give one from 64 to 128"),
        (
            GpuChunks,
            {"compute_registers": 240},
            "compute_registers=240 twice and copy",
        ),
        (GpuInt4, {"ring_bytes": 128 << 10}, "ring_bytes=131072: give one from 49152 to 98304"),
    ],
)
def test_numbers_outside_their_limits_are_refused(
    kind: type[Tunables], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{kind.OP} {kind.KERNEL}: {says}")):
        kind(**values)


def test_candidates_begin_with_the_defaults_and_go_together() -> None:
    found = list(GpuChunks.candidates())
    assert found[0] == GpuChunks() and len(set(found)) == len(found) == 24
    registers = {(each.compute_registers, each.copy_registers) for each in found}
    assert registers == {(232, 40), (232, 24), (240, 24)}


def test_a_file_is_found_by_the_devices_that_are_traced_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps({"kernels": {"gpu_decode": {"chosen": {"span": 128}}}}))
    monkeypatch.setattr(tuning, "_files", lambda op: {H100: path})
    assert device_kind() == jax.devices()[0].device_kind != H100
    assert tuned(GpuDecode) == GpuDecode()
    with on(H100):
        assert device_kind() == H100
        assert tuned(GpuDecode) == GpuDecode(span=128)
        assert tuned(GpuChunks) == GpuChunks(), "a file need not have all kernels"
        with trying(GpuDecode(ring_bytes=64 << 10)):
            assert tuned(GpuDecode) == GpuDecode(ring_bytes=64 << 10)
            assert tuned(GpuChunks) == GpuChunks()
        assert tuned(GpuDecode) == GpuDecode(span=128)
    with on("NVIDIA H200"):
        assert tuned(GpuDecode) == GpuDecode()


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"spam": 1, "egg": 2}, "bad.json: gpu_decode has no egg, spam"),
        ({"span": 65}, "bad.json: paged_attention gpu_decode: span=65: give one a multiple"),
    ],
)
def test_a_bad_file_is_named(chosen: dict[str, int], says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"kernels": {"gpu_decode": {"chosen": chosen}}}))
    with pytest.raises(ValueError, match=re.escape(says)):
        read(path, GpuDecode)


def test_what_the_h100_s_file_chooses_was_measured() -> None:
    """As package data; each choice's numbers are those of a candidate of the newest run."""
    path = Path(str(resources.files("pallas_kernels"))) / "paged_attention" / "tuned" / "h100.json"
    held = json.loads(path.read_text())
    assert held["kinds"] == [H100] and set(held["kernels"]) == {"gpu_decode", "gpu_chunks"}
    for kind in (GpuDecode, GpuChunks):
        kernel = held["kernels"][kind.KERNEL]
        for run in kernel["measured"]:
            assert {"date", "device", "versions", "commit", "where", "candidates"} <= set(run)
        newest = kernel["measured"][0]["candidates"]
        assert kernel["chosen"] in [candidate["values"] for candidate in newest]
        with on(H100):
            assert tuned(kind) == kind(**kernel["chosen"])
    with on("TPU v5 lite"):
        assert tuned(TpuDecode) == TpuDecode()


def test_the_ring_of_decode_has_a_block_for_each_warpgroup() -> None:
    assert ring_shape(GpuDecode(), 256, 2, "") == (4, 64)
    assert ring_shape(GpuDecode(span=128), 256, 2, "") == (2, 128)
    assert ring_shape(GpuDecode(span=128), 512, 2, "") == (2, 64), "heads of 256 have no room"
    assert ring_shape(GpuDecode(span=128), 256, 2, "int8") == (4, 64), "nor have wide values"
    assert ring_shape(GpuDecode(ring_bytes=32 << 10), 256, 2, "") == (2, 64)


def test_plans_have_the_numbers_that_are_chosen() -> None:
    default = make_plan(16_384, 128, 768)
    with trying(GpuGrouped(band=4, widest=128, ring_bytes=96 << 10)):
        other = make_plan(16_384, 128, 768)
    assert (default.band, default.columns, default.slots) == (8, 256, 4)
    assert (other.band, other.columns, other.slots) == (4, 128, 3)

"""Safetensors against the library's own writer, single and sharded, whole and broken."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxserve.errors import WeightsError
from jaxserve.formats.safetensors import INDEX, SINGLE, SafetensorsFile, open_safetensors


def tensors() -> dict[str, np.ndarray]:
    """One of each dtype that weights come in."""
    rng = np.random.default_rng(0)
    return {
        "f32": rng.normal(size=(3, 5)).astype(np.float32),
        "f16": rng.normal(size=(7,)).astype(np.float16),
        "bf16": rng.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
    }


def write_sharded(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    """Shards and their index."""
    for shard, held in shards.items():
        save_file(held, directory / shard)
    places = {name: shard for shard, held in shards.items() for name in held}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any JSON as its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_single_file_reads_back(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / SINGLE, metadata={"format": "np"})
    opened = open_safetensors(tmp_path)
    assert opened.names() == set(tensors())
    for name, expected in tensors().items():
        read = opened.read(name)
        assert (read.dtype, read.shape, opened.shape(name)) == (
            expected.dtype, expected.shape, expected.shape,
        )  # fmt: skip
        np.testing.assert_array_equal(read, expected)


def test_shards_read_back(tmp_path: Path) -> None:
    held = tensors()
    first = {name: held[name] for name in ("f32", "bf16")}
    second = {name: held[name] for name in ("f16", "scalar")}
    write_sharded(tmp_path, {"model-1.safetensors": first, "model-2.safetensors": second})
    opened = open_safetensors(tmp_path)
    assert opened.names() == set(held)
    for name, expected in held.items():
        np.testing.assert_array_equal(opened.read(name), expected)


def test_a_missing_shard_is_named_with_a_tensor_of_it(tmp_path: Path) -> None:
    held = tensors()
    write_sharded(
        tmp_path, {"a.safetensors": {"f32": held["f32"]}, "b.safetensors": {"f16": held["f16"]}}
    )
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"b\.safetensors") as caught:
        open_safetensors(tmp_path)
    assert "'f16'" in str(caught.value)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path, {"a.safetensors": {"f32": tensors()["f32"]}})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"ghost": "a.safetensors"}}))
    with pytest.raises(WeightsError, match="'ghost'"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "index",
    [b"", b"[1]", b"{}", b'{"weight_map": [1]}', b'{"weight_map": {"a": 3}}', b"\xff\xfe",
     b'{"weight_map": {"a": "../outside.safetensors"}}', b"[" * 100_000],
)  # fmt: skip
def test_a_broken_index_is_refused(index: bytes, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(index)
    with pytest.raises(WeightsError, match=r"index\.json"):
        open_safetensors(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="has no"):
        open_safetensors(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file without padding at its end."""
    path = tmp_path_factory.mktemp("whole") / SINGLE
    save_file(tensors(), path)
    return path.read_bytes()


@given(st.data())
def test_a_file_cut_off_anywhere_is_refused(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(WeightsError, match=r"cut\.safetensors"):
        SafetensorsFile(path)


def test_a_cut_off_tensor_is_named(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="cut off: tensor '"):
        SafetensorsFile(path)


@given(st.data())
def test_a_broken_header_never_gives_another_error(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    broken = bytearray(whole)
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "broken.safetensors"
    path.write_bytes(broken)
    with contextlib.suppress(WeightsError):
        file = SafetensorsFile(path)
        for name in file.names():
            assert file.read(name).shape == file.shape(name)


_ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "row",
    [
        [], None, {}, {**_ROW, "dtype": "F13"}, {**_ROW, "dtype": ["F32"]},
        {**_ROW, "shape": "ab"}, {**_ROW, "shape": ["a", 10**12]}, {**_ROW, "shape": [-2]},
        {**_ROW, "shape": [2.0]}, {**_ROW, "shape": [10**30]}, {**_ROW, "shape": 2},
        {**_ROW, "shape": [3]}, {**_ROW, "data_offsets": [8, 0]}, {**_ROW, "data_offsets": [0]},
        {**_ROW, "data_offsets": [-8, 0]}, {**_ROW, "data_offsets": [2**70, 2**70 + 8]},
        {**_ROW, "shape": [0, 10**30], "data_offsets": [0, 0]},
        {**_ROW, "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]},
        {**_ROW, "shape": [2, *[1] * 99]},
    ],
)  # fmt: skip
def test_an_absurd_entry_is_refused(row: Any, tmp_path: Path) -> None:
    path = write_raw(tmp_path / SINGLE, {"weight": row}, b"\0" * 16)
    with pytest.raises(WeightsError, match="'weight'"):
        SafetensorsFile(path)


@pytest.mark.parametrize("header", [b"[]", b"3", b"{", b"\xff", b"[" * 100_000])
def test_a_header_that_is_no_table_is_refused(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="header"):
        SafetensorsFile(write_raw(tmp_path / SINGLE, header))

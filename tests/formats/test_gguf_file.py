"""GGUF tensors: every element type that is read, and files that are cut off, foreign or absurd."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.formats.ggml_types import TYPES
from jaxserve.formats.gguf_file import GgufFile

ROWS, WIDTH = 6, 512


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]], **numbers: int) -> Path:
    """A GGUF file by llama.cpp's own writer; quantized tensors are given as bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in numbers.items():
        writer.add_uint32(key.replace("_", ".", 1), value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: Kind, seed: int = 0) -> np.ndarray:
    """Random bytes of ROWS × WIDTH values whose scales are ordinary float16 numbers."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (ROWS * WIDTH // size, num_bytes), np.uint8)
    scales = rng.normal(0, 0.1, (len(data), 2)).astype(np.float16).view(np.uint8)
    at = {"Q2_K": num_bytes - 4, "Q3_K": num_bytes - 2, "Q6_K": num_bytes - 2}.get(kind.name, 0)
    count = {"Q4_1": 4, "Q5_1": 4, "Q4_K": 4, "Q5_K": 4, "Q2_K": 4}.get(kind.name, 2)
    data[:, at : at + count] = scales[:, :count]
    return data.reshape(ROWS, -1)


def test_sizes_of_all_types_are_ggmls() -> None:
    for number, ours in TYPES.items():
        kind = Kind(number)
        assert (ours.name, (ours.block, ours.size)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])


@pytest.mark.parametrize("number", sorted(TYPES))
def test_every_type_reads_as_the_gguf_package_does(number: int, tmp_path: Path) -> None:
    kind = Kind(number)
    rng = np.random.default_rng(number)
    if TYPES[number].block == 1:
        values = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind.name]
        expected = values.astype(dtype)
        data = expected.view(np.uint8) if kind.name == "BF16" else expected
    else:
        data = blocks(kind, number)
        expected = gguf.dequantize(data, kind)
    file = GgufFile(
        write(tmp_path / "m.gguf", {"first": (data, kind), "second": (data[::2], kind)})
    )
    assert file.names() == {"first", "second"}
    assert file.shape("first") == (ROWS, WIDTH)
    np.testing.assert_array_equal(file.read("first"), expected)
    np.testing.assert_array_equal(file.read("second"), expected[::2])
    assert file.read("first").dtype == expected.dtype
    assert np.isfinite(expected.astype(np.float32)).all() and expected.astype(np.float32).std() > 0


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_many_blocks_are_decoded_alike(kind: Kind, tmp_path: Path) -> None:
    """More blocks than are decoded at a time."""
    values = np.random.default_rng(1).normal(size=(300, 1024)).astype(np.float32)
    data = gguf.quantize(values, kind)
    read = GgufFile(write(tmp_path / "m.gguf", {"t": (data, kind)})).read("t")
    np.testing.assert_array_equal(read, gguf.dequantize(data, kind))
    assert np.abs(read - values).max() < 0.5


def test_a_nibble_by_hand(tmp_path: Path) -> None:
    """Q4_1: two float16 (scale, offset), then low nibbles before high ones."""
    block = np.frombuffer(struct.pack("<ee16B", 0.5, -1.0, *range(0, 256, 16)), np.uint8).copy()
    block[4] = 0x21
    read = GgufFile(write(tmp_path / "m.gguf", {"t": (block[None], Kind.Q4_1)})).read("t")
    assert read[0, 0] == 0.5 * 1 - 1 and read[0, 16] == 0.5 * 2 - 1
    assert read[0, 31] == 0.5 * 15 - 1 and read[0, 15] == -1


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small but complete file."""
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    tensors = {
        "a": (blocks(Kind.Q4_1), Kind.Q4_1),
        "b": (np.arange(24, dtype=np.float32).reshape(4, 6), Kind.F32),
    }
    return write(path, tensors, llama_context_length=64).read_bytes()


@given(st.data())
def test_a_file_cut_off_anywhere_is_refused(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    # the writer pads the end: up to 31 bytes may go without loss
    length = data.draw(st.integers(0, len(whole) - 32))
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(whole[:length])
    with pytest.raises(WeightsError) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


@given(st.data())
def test_a_broken_header_never_gives_another_error(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the header changed at random: it opens, or says what is wrong."""
    broken = bytearray(whole)
    header = whole.index(b"b" + struct.pack("<I", 2)) + 40
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header))
        broken[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "broken.gguf"
    path.write_bytes(broken)
    with contextlib.suppress(WeightsError):
        file = GgufFile(path)
        for name in file.names():
            assert file.read(name).shape == file.shape(name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot read"),
        (b"PK\x03\x04 a zip archive", "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "cut off"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "cut off"),
    ],
)
def test_foreign_and_absurd_files_are_refused(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=words):
        GgufFile(path)


def test_a_missing_file_or_a_directory_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(WeightsError, match="cannot read"):
            GgufFile(path)


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a": (np.ones((2, 2), np.float32), Kind.F32)}, split_count=3)
    with pytest.raises(UnsupportedModel, match="one of 3 parts"):
        GgufFile(path)


def test_a_type_that_is_not_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a": (np.ones((2, 2), np.int32), Kind.I32)})
    with pytest.raises(UnsupportedModel, match="'a' is of ggml type 26; F32, F16"):
        GgufFile(path)

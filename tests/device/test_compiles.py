"""Compilations are counted, and a second start finds all of them in the persistent cache."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.device.compiles import (
    compile_counter,
    compiler_options,
    use_persistent_cache,
)
from jaxserve.errors import ConfigError
from tests.fakes.compile_cache import kept_cache_settings
from tests.models.loading import ORACLE


@pytest.fixture
def cache_settings() -> Iterator[None]:
    """Puts JAX's settings back."""
    with kept_cache_settings():
        yield


def test_each_compilation_is_counted_from_whichever_thread() -> None:
    counter = compile_counter()
    assert compile_counter() is counter
    x = jnp.arange(7)
    function = jax.jit(lambda x: x * 3 + 1)
    before = counter.count
    function(x)
    assert counter.count == before + 1
    function(x)
    assert counter.count == before + 1
    lowered = [jax.jit(lambda x, i=i: x * i).lower(x) for i in range(4)]
    assert counter.count == before + 1
    threads = [threading.Thread(target=one.compile) for one in lowered]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.count == before + 5


@pytest.mark.usefixtures("cache_settings")
def test_programs_are_kept_however_small_and_in_the_directory_given_last(tmp_path: Path) -> None:
    def compile_in(folder: str, factor: int) -> int:
        path = use_persistent_cache(str(tmp_path / folder))
        assert path == tmp_path / folder
        jax.jit(lambda x: x * factor).lower(jax.ShapeDtypeStruct((3,), "float32")).compile()
        return len([file for file in path.iterdir() if not file.name.endswith("-atime")])

    assert compile_in("a/b", 5) == 1
    assert compile_in("c", 6) == 1
    assert compile_in("a/b", 7) == 2


@pytest.mark.usefixtures("cache_settings")
def test_the_default_is_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert use_persistent_cache("") == tmp_path / ".cache/jaxserve/xla"
    assert use_persistent_cache("~/mine") == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"compile_cache_dir: cannot write .*give another"):
            use_persistent_cache(str(directory))
    with pytest.raises(ConfigError, match=r"cannot write to ~nobody-of-that-name"):
        use_persistent_cache("~nobody-of-that-name/cache")
    assert jax.config.jax_compilation_cache_dir == before


_START = """
import json, sys
import jax
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
from jaxserve.settings import load_config
from jaxserve.device.compiles import compile_counter
from jaxserve.engine.load import load_parts

settings = [
    f"engine.compile_cache_dir={sys.argv[1]}", f"model.path={sys.argv[2]}",
    "scheduler.max_rows=1", "scheduler.max_step_tokens=16",
]
parts = load_parts(load_config(settings=settings, environ={}), lambda *_: None)
hits = events.count("/jax/compilation_cache/cache_hits")
misses = events.count("/jax/compilation_cache/cache_misses")
print(json.dumps([hits, misses, compile_counter().count, parts.num_pages]))
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew(tmp_path: Path) -> None:
    """All of it: loading, the pool's arrays, every program; sized by the memory's share."""

    def start() -> list[int]:
        arguments = [str(tmp_path), str(ORACLE / "gemma3_linear")]
        done = subprocess.run(
            [sys.executable, "-c", _START, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    hits, misses, compiled, pages = start()
    assert hits == 0 and misses == compiled > 10
    assert start() == [compiled, 0, compiled, pages]


def test_compilers_are_told_what_they_misjudge() -> None:
    options = compiler_options("NVIDIA H100 80GB HBM3")
    assert options is not None and options["xla_disable_hlo_passes"] == "rematerialization"
    assert str(options["xla_gpu_enable_command_buffer"]).endswith("CONDITIONAL,WHILE")
    assert compiler_options("NVIDIA H200") == compiler_options("NVIDIA H100 80GB HBM3")
    without = compiler_options("NVIDIA H100 80GB HBM3", cuda_graphs=False)
    assert without == {**options, "xla_gpu_enable_command_buffer": ""}
    assert compiler_options("TPU7x", cuda_graphs=False) == compiler_options("TPU7x")
    assert compiler_options("TPU7x") == {"xla_tpu_control_large_2nd_minor_layout_for_x16": 0}
    assert compiler_options("TPU v6 lite") is compiler_options(jax.devices()[0].device_kind) is None

"""Names of adapters, the copies behind them, and where they come from."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxserve.config import LoraConfig
from jaxserve.errors import AdapterInUse, AdapterNotFound, ConfigError, InvalidAdapter
from jaxserve.formats.peft import WEIGHTS_FILE, Adapter, adapter_digest, read_adapter, write_adapter
from jaxserve.formats.peft_config import CONFIG_FILE
from jaxserve.lora.disk import DiskAdapters
from jaxserve.lora.registry import Registry, configured
from jaxserve.types import AdapterBase
from tests.fakes.s3 import REGION, S3Server
from tests.lora.adapters import random_adapter

MODULE = "model.layers.0.self_attn.q_proj"
BASE = AdapterBase(
    modules={"model.layers.*.self_attn.q_proj": (8, 8)}, num_layers=2, table="", max_rank=8
)


def adapter(seed: int, rank: int = 4) -> Adapter:
    """Of the one module of the base's first layer."""
    return random_adapter({MODULE: (8, 8)}, rank, seed)


def written(directory: Path, seed: int, rank: int = 4) -> str:
    """Its files; returns the directory."""
    write_adapter(directory, adapter(seed, rank))
    return str(directory)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A place for adapters."""
    return tmp_path / "sources"


def registry(tmp_path: Path, **fields: object) -> Registry:
    """One of a server's processes."""
    return Registry(LoraConfig(**{"enabled": True, **fields}), tmp_path / "state")


def held(own: Registry, key: str) -> np.ndarray:
    """The matrix of a copy."""
    return read_adapter(own.disk.path(key), max_rank=8).modules[MODULE].a


def test_configured_adapters_are_fetched_when_asked_for(tmp_path: Path, sources: Path) -> None:
    """Not before; and then by all processes."""
    one = registry(tmp_path, adapters=(f"a={sources / 'a'}", f"b={sources / 'b'}"))
    two = registry(tmp_path, adapters=(f"a={sources / 'a'}",))
    assert set(one.names()) == set(two.names()) == {"a", "b"}
    assert one.find("a").key == ""
    with pytest.raises(InvalidAdapter, match="no directory"):
        one.materialise("a", BASE)
    written(sources / "a", 1)
    key = one.materialise("a", BASE)
    assert key == adapter_digest(sources / "a") == two.find("a").key == one.find("a").key
    np.testing.assert_array_equal(held(one, key), adapter(1).modules[MODULE].a)


def test_reloading_gives_a_name_other_content(tmp_path: Path, sources: Path) -> None:
    """The old copy stays for those that run under it; a changed source alone changes nothing."""
    own = registry(tmp_path)
    source = written(sources, 1)
    old = own.load("a", source, BASE, replace=False)
    assert own.disk.hold(old.key)
    written(sources, 2)
    assert own.find("a") == old
    with pytest.raises(InvalidAdapter, match="load_inplace"):
        own.load("a", source, BASE, replace=False)
    new = own.load("a", source, BASE, replace=True)
    assert new.key != old.key and own.find("a") == new
    np.testing.assert_array_equal(held(own, old.key), adapter(1).modules[MODULE].a)
    np.testing.assert_array_equal(held(own, new.key), adapter(2).modules[MODULE].a)
    own.disk.release(old.key)


def test_unload_refuses_or_not(tmp_path: Path, sources: Path) -> None:
    """What another process holds counts."""
    one, two = registry(tmp_path), registry(tmp_path)
    entry = one.load("a", written(sources, 1), BASE, replace=False)
    assert two.disk.hold(entry.key) and two.disk.hold(entry.key)
    with pytest.raises(AdapterInUse, match="in_use"):
        one.unload("a", refuse_in_use=True)
    assert "a" in two.names()
    two.disk.release(entry.key)
    assert not asyncio.run(one.disk.await_unused(entry.key, 0.0))
    one.unload("a", refuse_in_use=False)
    with pytest.raises(AdapterNotFound):
        two.find("a")
    done = threading.Event()
    waiter = threading.Thread(
        target=lambda: asyncio.run(one.disk.await_unused(entry.key, 30.0)) and done.set(),
        daemon=True,
    )
    waiter.start()
    assert not done.is_set()
    two.disk.release(entry.key)
    waiter.join()
    assert done.is_set()
    with pytest.raises(AdapterNotFound):
        one.unload("a", refuse_in_use=True)


def test_a_name_that_is_unloaded_while_it_is_fetched_stays_away(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetch that ends afterwards does not bring it back."""
    own = registry(tmp_path, adapters=(f"a={written(sources, 1)}",))
    add = own.disk.add

    def slow(*how: Callable[[Path], None]) -> str:
        key = add(*how)
        registry(tmp_path).unload("a", refuse_in_use=False)
        return key

    monkeypatch.setattr(own.disk, "add", slow)
    with pytest.raises(AdapterNotFound, match="meanwhile"):
        own.materialise("a", BASE)
    assert own.names() == {}


def test_a_root_is_searched(tmp_path: Path, sources: Path) -> None:
    """For names that are not known, and nowhere else."""
    written(sources / "team" / "a", 1)
    written(tmp_path / "secret", 2)
    (sources / "link").symlink_to(tmp_path / "secret")
    (sources / "empty").mkdir()
    own = registry(tmp_path, root=str(sources))
    assert own.materialise("team/a", BASE) == adapter_digest(sources / "team" / "a")
    assert own.find("team/a").key
    for name in ("nothing", "link", "empty", "../secret", "team/../team/a", "/etc", "", "team//a"):
        with pytest.raises(AdapterNotFound):
            own.find(name)
    with pytest.raises(AdapterNotFound):
        registry(tmp_path / "other").find("team/a")


@pytest.mark.parametrize(
    ("name", "source", "says"),
    [
        ("../a", "/tmp", "adapter name"),
        ("a:b", "/tmp", "adapter name"),
        ("a" * 129, "/tmp", "adapter name"),
        ("a", "relative/path", "absolute"),
        ("a", "~nobody-of-that-name/a", "home directory"),
        ("a", "/tmp/../etc", r"'\.\.'"),
        ("a", "ftp://host/a", "not supported"),
        ("a", "/does/not/exist", "no directory"),
    ],
)
def test_refused_names_and_addresses(tmp_path: Path, name: str, source: str, says: str) -> None:
    """With the reason; nothing is registered."""
    own = registry(tmp_path)
    with pytest.raises(InvalidAdapter, match=says):
        own.load(name, source, BASE, replace=False)
    assert own.names() == {}


def test_refused_content(tmp_path: Path, sources: Path) -> None:
    """A rank over the limit, another base, NaN, cut off, too large; no copy stays."""
    own = registry(tmp_path, max_bytes=4096)

    def refused(says: str) -> None:
        with pytest.raises(InvalidAdapter, match=says) as caught:
            own.load("a", str(sources), BASE, replace=False)
        assert str(own.disk.directory) not in caught.value.message

    written(sources, 1, rank=9)
    refused("rank 9, the limit is 8")
    write_adapter(sources, random_adapter({MODULE: (8, 12)}, 4, 1))
    refused("another base")
    write_adapter(sources, random_adapter({"model.layers.2.self_attn.q_proj": (8, 8)}, 4, 1))
    refused("no module")
    write_adapter(sources, random_adapter({MODULE: (8, 8)}, 4, 1, scale=float("nan")))
    refused("not finite")
    written(sources, 1)
    weights = sources / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-4])
    refused(f"{weights} is cut off")
    weights.write_bytes(b"\0" * 5000)
    refused("max_bytes=4096")
    (sources / CONFIG_FILE).unlink()
    refused("adapter_config.json is missing")
    assert own.names() == {}
    assert [path.name for path in own.disk.directory.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("text", ["a", "a=", "a=/x,a=/y", "../a=/x", "a=/x/../y"])
def test_malformed_configuration(text: str) -> None:
    """Ends the start."""
    with pytest.raises(ConfigError, match=r"lora\.adapters"):
        configured(LoraConfig(adapters=tuple(text.split(","))))


def test_copies_are_bounded_in_bytes(tmp_path: Path, sources: Path) -> None:
    """The least recently used go first; never one that is held."""

    def add(disk: DiskAdapters, seed: int) -> str:
        source = written(sources / str(seed), seed)
        key = disk.add(
            lambda into: shutil.copytree(source, into, dirs_exist_ok=True), lambda into: None
        )
        os.utime(disk.path(key), (seed, seed))
        return key

    size = sum(f.stat().st_size for f in Path(written(sources / "0", 0)).iterdir())
    disk = DiskAdapters(tmp_path / "cache", int(3.5 * size))
    keys = [add(disk, seed) for seed in range(1, 4)]
    assert all(disk.path(key).exists() for key in keys)
    assert disk.hold(keys[0])
    os.utime(disk.path(keys[0]), (1, 1))
    keys.append(add(disk, 4))
    assert [disk.path(key).exists() for key in keys] == [True, False, True, True]
    assert not disk.hold(keys[1])
    disk.release(keys[0])
    os.utime(disk.path(keys[0]), (1, 1))
    keys.append(add(disk, 5))
    assert [disk.path(key).exists() for key in keys] == [False, False, True, True, True]
    assert add(disk, 2) == keys[1]


def test_copies_are_looked_into_once(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, and those of other processes too, which count."""
    directory, scandir = tmp_path / "cache", os.scandir
    looked: list[Path] = []

    def seen(path: str | Path):
        if Path(path).parent == directory:
            looked.append(Path(path))
        return scandir(path)

    def add(disk: DiskAdapters, seed: int) -> Path:
        source = Path(written(sources / str(seed), seed))

        def fetch(into: Path) -> None:
            for file in source.iterdir():
                shutil.copy(file, into)

        return disk.path(disk.add(fetch, lambda into: None))

    size = sum(f.stat().st_size for f in Path(written(sources / "0", 0)).iterdir())
    one, two = (DiskAdapters(directory, 25 * size + size // 2) for _ in range(2))
    theirs = [add(two, seed) for seed in range(10)]
    monkeypatch.setattr(os, "scandir", seen)
    ours = [add(one, seed) for seed in range(10, 25)]
    assert sorted(looked) == sorted([*theirs, *ours])
    monkeypatch.undo()
    for seed, path in enumerate([*theirs, *ours]):
        os.utime(path, (seed, seed))
    newest = add(one, 25)
    assert [path.exists() for path in (*theirs, *ours, newest)] == [False, *[True] * 25]


def test_two_processes_fetch_the_same_at_once(tmp_path: Path, sources: Path) -> None:
    """One copy, whole."""
    source = written(sources, 1)
    own = [registry(tmp_path, adapters=(f"a={source}",)) for _ in range(6)]
    keys: list[str] = []
    threads = [
        threading.Thread(target=lambda r=r: keys.append(r.materialise("a", BASE))) for r in own
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys == [adapter_digest(sources)] * 6
    assert [p.name for p in own[0].disk.directory.iterdir() if p.is_dir()] == [keys[0]]


def test_what_a_killed_server_left_is_removed(tmp_path: Path) -> None:
    """And nothing that somebody is fetching, in this process or another."""
    directory = tmp_path / "cache"
    one = DiskAdapters(directory, 10**9)
    left = directory / "partial-left"
    left.mkdir()
    (left / WEIGHTS_FILE).write_bytes(b"x" * 100)
    seen: list[set[str]] = []

    def fetch(into: Path) -> None:
        """Meanwhile another server starts."""
        write_adapter(into, adapter(1))
        DiskAdapters(directory, 10**9)
        seen.append({path.name for path in directory.glob("partial-*")})
        assert into.is_dir()

    key = one.add(fetch, lambda into: None)
    assert one.hold(key) and seen == [seen[0] - {"partial-left"}] and len(seen[0]) == 1
    assert not list(directory.glob("partial-*"))
    DiskAdapters(directory, 10**9)
    assert one.path(key).is_dir()


def test_names_of_models_are_no_adapters(tmp_path: Path, sources: Path) -> None:
    """Neither configured, nor loaded, nor found under the root."""
    written(sources / "minilm", 1)
    own = Registry(LoraConfig(enabled=True, root=str(sources)), tmp_path / "state", {"minilm"})
    with pytest.raises(AdapterNotFound):
        own.find("minilm")
    with pytest.raises(InvalidAdapter, match="name of a model"):
        own.load("minilm", str(sources / "minilm"), BASE, replace=True)
    config = LoraConfig(enabled=True, adapters=(f"minilm={sources / 'minilm'}",))
    with pytest.raises(ConfigError, match="name of a model"):
        configured(config, {"minilm"})


def test_from_an_s3_store(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the two files; what is missing or cut off is refused; a root may be there, too."""
    boto3 = pytest.importorskip("boto3")
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", REGION),
    ):
        monkeypatch.setenv(name, value)
    with S3Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        store = boto3.client("s3")
        store.create_bucket(Bucket="adapters")
        written(sources, 1)
        for file in sources.iterdir():
            store.upload_file(str(file), "adapters", f"team/a/{file.name}")
        store.put_object(Bucket="adapters", Key="team/a/optimizer.pt", Body=b"x" * 999)
        own = registry(tmp_path, root="s3://adapters/team")
        key = own.load("mine", "s3://adapters/team/a", BASE, replace=False).key
        assert key == adapter_digest(sources) == own.materialise("a", BASE)
        assert sorted(p.name for p in own.disk.path(key).iterdir()) == sorted(
            (CONFIG_FILE, WEIGHTS_FILE)
        )
        with pytest.raises(AdapterNotFound, match="no adapter 'b' under"):
            own.materialise("b", BASE)
        with pytest.raises(AdapterNotFound, match="no adapter 'b' under"):
            own.look_up("b")
        fresh = Registry(LoraConfig(enabled=True, root="s3://adapters/team"), tmp_path / "other")
        assert fresh.look_up("a").source == "s3://adapters/team/a"
        with pytest.raises(InvalidAdapter, match="s3://adapters/none"):
            own.load("c", "s3://adapters/none", BASE, replace=False)

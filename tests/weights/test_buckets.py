"""Models from buckets: over fsspec's file system in memory, and s3:// over HTTP."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.client import BaseClient
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file

from jaxserve.config import ModelConfig, WeightsConfig
from jaxserve.errors import WeightsError
from jaxserve.weights import buckets
from jaxserve.weights.buckets import download
from jaxserve.weights.convert import convert
from jaxserve.weights.sources import resolve, served_name
from tests.fakes.s3 import REGION, S3Server
from tests.models.loading import ORACLE, config_of
from tests.weights.gguf_files import write_gguf
from tests.weights.model_files import SERVED, check_parameters, check_tiny, files_in, tiny

KIB = 1 << 10
ADDRESS = "memory://models/tiny"


class Bucket(MemoryFileSystem):
    """Objects in memory that are this test's own, and what was opened."""

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.store = {}
        self.pseudo_dirs = [""]
        self.opened: list[str] = []

    def write(self, name: str, data: bytes, time_s: int = 1_700_000_000) -> None:
        """Writes an object of ADDRESS, last changed at that time."""
        path = f"/models/tiny/{name}"
        self.pipe_file(path, data)
        self.store[path].modified = self.store[path].modified.fromtimestamp(
            time_s, self.store[path].modified.tzinfo
        )

    def open(self, path: str, *args: Any, **options: Any) -> Any:
        self.opened.append(path.removeprefix("/models/tiny/"))
        return super().open(path, *args, **options)


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


def nothing(phase: str, done: int, total: int) -> None:
    """A progress that nobody looks at."""


def test_what_is_served_is_copied_once(bucket: Bucket, tmp_path: Path) -> None:
    for name, data in tiny().items():
        bucket.write(name, data)
    bucket.opened.clear()
    path = download(bucket, ADDRESS, tmp_path, nothing)
    assert files_in(path) == SERVED and sorted(bucket.opened) == sorted(SERVED)
    check_tiny(path)
    bucket.opened.clear()
    assert download(bucket, f"{ADDRESS}/", tmp_path, nothing) == path
    assert bucket.opened == []


def test_progress_counts_bytes(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_CHUNK_BYTES", 4)
    bucket.write("a.json", b"123456")
    bucket.write("b.safetensors", b"1234")
    events: list[tuple[str, int, int]] = []
    download(bucket, ADDRESS, tmp_path, lambda *event: events.append(event))
    assert events == [("downloading", done, 10) for done in (4, 6, 6, 10, 10)]


def interrupt_at(num_bytes: int) -> Any:
    """A progress at which somebody presses Ctrl-C."""

    def progress(phase: str, done: int, total: int) -> None:
        if done == num_bytes:
            raise KeyboardInterrupt

    return progress


def interrupted(bucket: Bucket, cache: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> Path:
    """Four of the bytes of a file are there; the directory."""
    monkeypatch.setattr(buckets, "_CHUNK_BYTES", 4)
    bucket.write("model.safetensors", data)
    with pytest.raises(KeyboardInterrupt):
        download(bucket, ADDRESS, cache, interrupt_at(4))
    (directory,) = (path for path in cache.iterdir() if path.is_dir())
    return directory


def test_a_file_has_its_name_only_when_it_is_whole(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = interrupted(bucket, tmp_path, monkeypatch, b"0123456789")
    assert files_in(directory) == {"model.safetensors.1700000000.partial"}
    # What is there is taken as it is: only the rest is read.
    (directory / "model.safetensors.1700000000.partial").write_bytes(b"abcd")
    assert download(bucket, ADDRESS, tmp_path, nothing) == directory
    assert files_in(directory) == {"model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == b"abcd456789"


def test_a_part_of_an_older_object_is_not_gone_on_with(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = interrupted(bucket, tmp_path, monkeypatch, b"0123456789")
    bucket.write("model.safetensors", b"abcdefghij", time_s=1_700_000_060)
    download(bucket, ADDRESS, tmp_path, nothing)
    assert files_in(directory) == {"model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == b"abcdefghij"


def test_a_part_that_is_too_long_is_dropped(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = interrupted(bucket, tmp_path, monkeypatch, b"0123456789")
    (directory / "model.safetensors.1700000000.partial").write_bytes(b"x" * 11)
    download(bucket, ADDRESS, tmp_path, nothing)
    assert (directory / "model.safetensors").read_bytes() == b"0123456789"


def test_an_object_replaced_by_one_of_its_size_is_fetched_again(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.write("model.safetensors", b"first")
    bucket.write("config.json", b"{}")
    path = download(bucket, ADDRESS, tmp_path, nothing)
    bucket.write("model.safetensors", b"tuned", time_s=1_700_000_001)
    bucket.opened.clear()
    assert download(bucket, ADDRESS, tmp_path, nothing) == path
    assert (path / "model.safetensors").read_bytes() == b"tuned"
    assert bucket.opened == ["model.safetensors"]


def test_an_object_that_is_gone_goes_here_too(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("config.json", b"{}")
    bucket.write("model.safetensors.index.json", b"{}")
    path = download(bucket, ADDRESS, tmp_path, nothing)
    bucket.rm("/models/tiny/model.safetensors.index.json")
    download(bucket, ADDRESS, tmp_path, nothing)
    assert files_in(path) == {"config.json"}


@pytest.mark.parametrize("now", [b"shorter", b"longer than it was"])
def test_a_size_that_changes_in_between_is_one_sentence(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: bytes
) -> None:
    bucket.write("model.safetensors", b"0123456789")
    listing = bucket.find("/models/tiny", detail=True)
    bucket.write("model.safetensors", now)
    with monkeypatch.context() as patch:
        patch.setattr(bucket, "find", lambda root, detail: listing)
        with pytest.raises(WeightsError) as raised:
            download(bucket, ADDRESS, tmp_path, nothing)
    assert str(raised.value) == (
        f"model.safetensors ended after {len(now)} of 10 bytes: the connection broke, or the file "
        "changed; start again"
    )
    assert not list(tmp_path.rglob("model.safetensors"))
    path = download(bucket, ADDRESS, tmp_path, nothing)
    assert (path / "model.safetensors").read_bytes() == now


def test_a_full_disk_is_one_sentence(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = interrupted(bucket, tmp_path, monkeypatch, b"0123456789")
    partial = directory / "model.safetensors.1700000000.partial"
    partial.unlink()
    partial.symlink_to("/dev/full")
    with pytest.raises(WeightsError) as raised:
        download(bucket, ADDRESS, tmp_path, nothing)
    assert str(raised.value) == (
        f"downloading {ADDRESS} failed: OSError: [Errno 28] No space left on device; start again "
        "to resume"
    )
    assert not (directory / "model.safetensors").exists()


def test_a_cache_that_may_not_be_written_is_not_the_stores_fault(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))  # root gets none

    bucket.write("config.json", b"{}")
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(WeightsError) as raised:
        download(bucket, ADDRESS, tmp_path / "cache", nothing)
    assert str(raised.value) == (
        f"downloading {ADDRESS} failed: PermissionError: [Errno 13] Permission denied: "
        f"'{tmp_path}/cache'; start again to resume"
    )


@pytest.mark.parametrize("address", [ADDRESS, "memory://models", "memory://other/tiny"])
def test_no_model_is_one_sentence(bucket: Bucket, tmp_path: Path, address: str) -> None:
    bucket.write("README.md", b"nothing else")
    with pytest.raises(WeightsError, match=f"^there are no model files at {address}$"):
        download(bucket, address, tmp_path, nothing)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_named_orbax_is_no_checkpoint(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("orbax/config.json", b"{}")
    bucket.write("orbax/pytorch_model.bin", b"pickled")
    bucket.write("orbax/old/orbax/pytorch_model.bin", b"pickled")
    path = download(bucket, f"{ADDRESS}/orbax", tmp_path, nothing)
    assert files_in(path) == {"config.json"}


def test_two_downloads_at_once_are_one(bucket: Bucket, tmp_path: Path) -> None:
    bucket.write("config.json", b"{}")
    bucket.write("model.safetensors", b"0123456789")
    bucket.opened.clear()
    inside, waiting = threading.Event(), threading.Event()
    paths: list[Path] = []

    class Waits(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert "another process downloads the same model" in record.getMessage()
            waiting.set()

    def first(phase: str, done: int, total: int) -> None:
        inside.set()
        assert waiting.wait(60)

    def run(progress: Any) -> None:
        paths.append(download(bucket, ADDRESS, tmp_path, progress))

    log, handler = logging.getLogger("jaxserve.weights.partial"), Waits()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    threads = [threading.Thread(target=run, args=(progress,)) for progress in (first, nothing)]
    try:
        threads[0].start()
        assert inside.wait(60)
        threads[1].start()
        for thread in threads:
            thread.join(60)
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    assert len(paths) == 2 and len(set(paths)) == 1
    assert sorted(bucket.opened) == ["config.json", "model.safetensors"]
    assert (paths[0] / "model.safetensors").read_bytes() == b"0123456789"


# From here on with s3fs, over HTTP.


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


@pytest.fixture
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a user sets for a store that speaks S3."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


class S3:
    """A bucket on the server."""

    def __init__(self, client: BaseClient, server: S3Server, name: str, cache: Path) -> None:
        client.create_bucket(Bucket=name)
        self.client, self.server, self.name, self.cache = client, server, name, cache

    def put(self, files: dict[str, bytes], prefix: str = "tiny/") -> None:
        """Uploads files."""
        for name, data in files.items():
            self.client.put_object(Bucket=self.name, Key=prefix + name, Body=data)

    def resolve(self, key: str, progress: Any = nothing) -> Path:
        """Where the model is then; `server.requests` has what that took."""
        self.server.requests.clear()
        model = ModelConfig(path=f"s3://{self.name}/{key}")
        return resolve(model, WeightsConfig(cache_dir=str(self.cache)), progress)

    def reads(self) -> list[tuple[str, str]]:
        """Key and range of the objects read."""
        start = f"/{self.name}/"
        return [
            (path.removeprefix(start), asked)
            for method, path, asked in self.server.requests
            if method == "GET" and path.startswith(start)
        ]


@pytest.fixture
def s3(environment: None, server: S3Server, tmp_path: Path) -> Iterator[S3]:
    client = boto3.client("s3")
    yield S3(client, server, f"models-{uuid.uuid4().hex}", tmp_path / "cache")
    client.close()


def test_s3_holds_a_model(s3: S3) -> None:
    s3.put(tiny())
    s3.put({"config.json": b"{}"}, prefix="tiny-2/")  # of no concern
    path = s3.resolve("tiny")
    assert files_in(path) == SERVED
    check_tiny(path)
    size = len(tiny()["model.safetensors"])
    assert ("tiny/model.safetensors", f"bytes=0-{size - 1}") in s3.reads()
    assert s3.resolve("tiny/") == path
    assert s3.reads() == []


def test_s3_has_a_cache_of_ours_by_default(
    s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3.put({"config.json": b"{}"})
    monkeypatch.setenv("HOME", str(tmp_path))
    path = resolve(ModelConfig(path=f"s3://{s3.name}/tiny"), WeightsConfig())
    assert path.parent == tmp_path / ".cache" / "jaxserve" / "models"
    s3.cache = Path("~/.cache/jaxserve/models")
    assert s3.resolve("tiny") == path
    assert s3.reads() == []


def test_s3_goes_on_in_the_middle_of_a_file(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_CHUNK_BYTES", 100 * KIB)
    weights = tiny()["model.safetensors"]
    s3.put({"model.safetensors": weights})
    with pytest.raises(KeyboardInterrupt):
        s3.resolve("tiny", interrupt_at(200 * KIB))
    path = s3.resolve("tiny")
    assert s3.reads() == [("tiny/model.safetensors", f"bytes={200 * KIB}-{len(weights) - 1}")]
    assert (path / "model.safetensors").read_bytes() == weights


def test_s3_sees_a_replaced_object(s3: S3) -> None:
    s3.put({"config.json": b'{"a": 1}', "model.safetensors": b"first"})
    path = s3.resolve("tiny")
    before = int((path / "model.safetensors").stat().st_mtime)
    while int(time.time()) == before:  # S3's times are in seconds
        time.sleep(0.05)
    s3.put({"model.safetensors": b"tuned"})
    assert s3.resolve("tiny") == path
    assert (path / "model.safetensors").read_bytes() == b"tuned"
    assert [key for key, _ in s3.reads()] == ["tiny/model.safetensors"]


def test_s3_holds_a_single_gguf_file(s3: S3, tmp_path: Path) -> None:
    weights = load_file(ORACLE / "llama3" / "model.safetensors")
    file = write_gguf(tmp_path / "m.gguf", config_of("llama3"), weights)
    s3.put({"tiny-F32.gguf": file.read_bytes(), "other.gguf": b"no"}, prefix="")
    path = s3.resolve("tiny-F32.gguf")
    assert path.name == "tiny-F32.gguf" and path.read_bytes() == file.read_bytes()
    assert files_in(path.parent) == {"tiny-F32.gguf"}
    check_parameters(path)
    assert served_name(ModelConfig(path=f"s3://{s3.name}/tiny-F32.gguf")) == "tiny-F32"


def test_s3_holds_an_orbax_directory(s3: S3, tmp_path: Path) -> None:
    convert(ORACLE / "llama3", tmp_path / "orbax")
    s3.put(
        {name: (tmp_path / "orbax" / name).read_bytes() for name in files_in(tmp_path / "orbax")}
    )
    s3.put({"orbax/": b""})  # what consoles make for a folder
    path = s3.resolve("tiny")
    assert files_in(path) == files_in(tmp_path / "orbax")
    check_parameters(path)


def test_s3_names_may_have_spaces_and_more(s3: S3) -> None:
    files = {"config.json": b"{}", "a b/ü+%20#?.json": b'{"x": 1}', "100%.jinja": b"x"}
    s3.put(files, prefix="my models/tiny 1/")
    path = s3.resolve("my models/tiny 1")
    assert {name: (path / name).read_bytes() for name in files_in(path)} == files


def test_s3_the_bucket_itself_is_an_address(s3: S3) -> None:
    s3.put({"config.json": b"{}", "sub/config.json": b"{}"}, prefix="")
    assert files_in(s3.resolve("")) == {"config.json", "sub/config.json"}


def refused(s3: S3, key: str) -> str:
    """What is said, in one line."""
    with pytest.raises(WeightsError) as raised:
        s3.resolve(key)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", ["../../evil.json", "a/../../../evil.json", ".."])
def test_s3_names_cannot_lead_out_of_the_cache(s3: S3, tmp_path: Path, name: str) -> None:
    s3.put({"config.json": b"{}", name: b"{}"})
    assert refused(s3, "tiny") == (
        f"s3://{s3.name}/tiny: an object's name leads outside of it: '{s3.name}/tiny/{name}'"
    )
    assert not list(tmp_path.rglob("*.json"))


def test_s3_says_what_is_missing(s3: S3) -> None:
    assert refused(s3, "none") == f"there are no model files at s3://{s3.name}/none"
    s3.name = "no-such-bucket"
    assert refused(s3, "tiny") == (
        "s3://no-such-bucket/tiny: there is no such bucket or object (The specified bucket does "
        "not exist)"
    )


def test_s3_without_an_address_is_one_sentence(environment: None, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="^downloading s3:// failed: ValueError: "):
        resolve(ModelConfig(path="s3://"), WeightsConfig(cache_dir=str(tmp_path)))


def test_s3_says_that_rights_are_missing(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put({"config.json": b"{}"})
    iam = boto3.client("iam")
    iam.create_user(UserName=s3.name)
    key = iam.create_access_key(UserName=s3.name)["AccessKey"]
    listing = {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "*"}
    policy = {"Version": "2012-10-17", "Statement": [listing]}
    iam.put_user_policy(UserName=s3.name, PolicyName="p", PolicyDocument=json.dumps(policy))
    iam.close()
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)

    def says(reason: str) -> None:
        assert refused(s3, "tiny") == (
            f"s3://{s3.name}/tiny: access denied ({reason}); check the store's credentials in the "
            "environment"
        )

    says("The AWS Access Key Id you provided does not exist in our records.")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    says(
        "The request signature we calculated does not match the signature you provided. Check "
        "your key and signing method."
    )
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    says("Access Denied")  # it may list, not read
    assert not list(s3.cache.rglob("config.json"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "NoCredentialsError: Unable to locate credentials"),
        ({"AWS_PROFILE": "none"}, "ProfileNotFound: The config profile (none) could not be found"),
    ],
)
def test_s3_says_that_credentials_are_missing(
    s3: S3, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], reason: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert refused(s3, "tiny") == (
        f"downloading s3://{s3.name}/tiny failed: {reason}; start again to resume"
    )


@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")]
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, extra: str
) -> None:
    monkeypatch.setattr(buckets, "find_spec", lambda name: None)
    with pytest.raises(WeightsError) as raised:
        resolve(ModelConfig(path=f"{scheme}://models/tiny"), WeightsConfig())
    assert str(raised.value) == (
        f"{scheme}://models/tiny: {scheme}:// needs the package {package}: scripts/setup {extra}, "
        f"or pip install {package}"
    )

"""Models of the Hugging Face hub, into the hub's own cache.

`huggingface_hub` starts a file from its beginning again when the process before was ended in the
middle of it (its issue 4196). So the large files, which it names by their content, are put into
its cache first, resumed with Range requests; it then finds them there, fetches the small ones and
lays out the snapshot.
"""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO, Self

from jaxserve.config import ModelConfig, WeightsConfig
from jaxserve.errors import WeightsError
from jaxserve.weights.partial import Progress, alone, complete, one_line

_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "orbax/**")
#: Weights in subdirectories are other forms of the same model.
_OTHER_FILES = ("*/*.safetensors",)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONNECTIONS = 8


def from_hub(model: ModelConfig, weights: WeightsConfig, progress: Progress) -> Path:
    """The directory of a snapshot in the hub's cache.

    Raises:
        WeightsError: there is none, it may not be read, or the download failed.
    """
    from huggingface_hub import constants, snapshot_download

    options: dict[str, Any] = {"revision": model.revision or None, "token": model.token or None}
    cache = Path(weights.cache_dir or constants.HF_HUB_CACHE).expanduser()
    try:
        _fetch_large_files(model.path, cache, progress, **options)
        directory = Path(
            snapshot_download(
                model.path,
                allow_patterns=list(_FILES),
                ignore_patterns=list(_OTHER_FILES),
                cache_dir=cache,
                **options,
            )
        )
    except Exception as error:  # of huggingface_hub, of the HTTP library below it, of the disk
        raise WeightsError(_reason(model, error)) from error
    if not (directory / "config.json").is_file():
        raise WeightsError(
            f"{_where(model)} has no config.json: the hub's models are read from safetensors or "
            "Orbax; a .gguf file is given by its path"
        )
    return directory


def _fetch_large_files(
    name: str, cache: Path, progress: Progress, revision: str | None, token: str | None
) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.file_download import hf_hub_url, http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers, filter_repo_objects

    try:
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True)
    except Exception:
        return  # `snapshot_download` finds a copy in the cache, or says what is wrong
    folder = repo_folder_name(repo_id=name, repo_type="model")
    missing: dict[Path, tuple[str, int]] = {}
    for file in filter_repo_objects(
        info.siblings or (),
        allow_patterns=list(_FILES),
        ignore_patterns=list(_OTHER_FILES),
        key=lambda file: file.rfilename,
    ):
        here = try_to_load_from_cache(name, file.rfilename, cache_dir=cache, revision=info.sha)
        if file.lfs and _SHA256.fullmatch(file.lfs.sha256) and not isinstance(here, str):
            blob = cache / folder / "blobs" / file.lfs.sha256
            if not blob.exists():
                missing[blob] = (file.rfilename, file.lfs.size)
    if not missing:
        return
    headers = build_hf_headers(token=token)
    meter: Any = _Meter(progress, sum(size for _, size in missing.values()))

    def fetch(blob: Path, filename: str, size: int) -> None:
        def copy(sink: BinaryIO) -> None:
            http_get(
                hf_hub_url(name, filename, revision=info.sha),
                sink,
                resume_size=sink.tell(),
                headers=headers,
                expected_size=size,
                tqdm_class=meter,
            )

        if not blob.exists():  # still, now that nobody else is at it
            complete(blob, blob.with_name(f"{blob.name}.incomplete"), size, copy)

    lock = cache / ".locks" / folder / "jaxserve.lock"
    with alone(lock), ThreadPoolExecutor(_CONNECTIONS) as pool:
        try:
            files = [pool.submit(fetch, blob, *file) for blob, file in missing.items()]
            for done in as_completed(files):
                done.result()
        except BaseException:  # an interrupt too: the other threads end with their next chunk
            meter.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Meter:
    """Counts the bytes of all files. `http_get` takes it for a class of progress bars."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.stopped = False
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, *, initial: int = 0, **options: object) -> Self:
        self.update(initial)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, num_bytes: int) -> None:
        """Before they are written: raising here stops the download."""
        if self.stopped:
            raise InterruptedError("another file's download failed")
        with self._lock:
            self._done += num_bytes
            self._progress("downloading", self._done, self._total)


def _where(model: ModelConfig) -> str:
    return repr(model.path) + (f" at revision {model.revision!r}" if model.revision else "")


def _reason(model: ModelConfig, error: Exception) -> str:
    """One sentence: what is wrong, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = _where(model)
    # "Not in the cache" is what it says whatever the hub answered.
    unanswered = isinstance(error, LocalEntryNotFoundError)
    answer = (error.__cause__ or error) if unanswered else error
    if isinstance(answer, RevisionNotFoundError):
        return f"the hub's {model.path!r} has no revision {model.revision!r}: check model.revision"
    if isinstance(answer, GatedRepoError):
        return (
            f"{where} is gated: accept its terms on the hub, and give the token of an account "
            "that did as model.token"
        )
    if isinstance(answer, RepositoryNotFoundError):
        return (
            f"the hub knows no {where} that may be read with this token: check model.path, and "
            "model.token for a private model"
        )
    if isinstance(answer, HfHubHTTPError):
        status = answer.response.status_code
        remedy = "check model.token" if status in (401, 403) else "try again later"
        return f"the hub refuses {where} (HTTP status {status}): {remedy}"
    if unanswered:
        return (
            f"cannot get {where} from the hub ({one_line(answer)}), and its cache has no whole "
            f"copy: is {model.path!r} meant as a path, or the network down?"
        )
    return f"downloading {where} failed: {one_line(error)}; start again to resume"

"""Which rows the latest commits may have changed, from the files that they touch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

_ROOT = Path(__file__).parents[2]
#: Beginnings of paths, and what the names of the rows that compile those files hold.
_CONCERNED = {
    "pallas_kernels/paged_attention/": (
        "paged_attention/",
        "write_and_attend/",
        "/decode",
        "/prefill",
    ),
    "pallas_kernels/kv_update/": ("kv_update/", "/decode", "/prefill"),
    "pallas_kernels/quantized_pages.py": ("kv_update/", "paged_attention/", "fp8-cache"),
    "pallas_kernels/grouped_matmul/": ("grouped_matmul/", "qwen3-30b-a3b"),
    "pallas_kernels/quant_matmul/": ("quant_matmul/", "-int8", "-int4"),
    "pallas_kernels/lora_matmul/": ("lora_matmul/",),
    "pallas_kernels/hopper.py": ("/h100:1",),
    "pallas_kernels/tuning.py": (
        *("paged_attention/", "write_and_attend/", "grouped_matmul/", "quant_matmul/"),
    ),
    "pallas_kernels/ragged.py": ("paged_attention/", "write_and_attend/", "kv_update/"),
    "jaxserve/device/": ("/decode", "/prefill"),
    "jaxserve/models/": ("/decode", "/prefill"),
    "jaxserve/sampling/": ("/decode", "/prefill"),
    "benchmarks/compile_check/": (
        *("/decode", "/prefill", "paged_attention/", "write_and_attend/", "kv_update/"),
        *("lora_matmul/", "grouped_matmul/", "quant_matmul/"),
    ),
}


def files_changed(hours: float) -> list[str]:
    """Files touched by the commits of the last hours before the newest, as far as history goes.

    Raises:
        RuntimeError: this is no git checkout, or there is no git.
    """
    newest = int(_git("log", "-1", "--format=%ct"))
    since = newest - int(3600 * hours)
    return sorted(set(_git("log", f"--since={since}", "--name-only", "--format=").split()))


def patterns(files: Iterable[str]) -> list[str]:
    """What the names of the rows concerned hold; empty where none is."""
    found = {
        pattern: None
        for file in files
        for beginning, concerned in _CONCERNED.items()
        if file.startswith(beginning)
        for pattern in concerned
    }
    return list(found)


def _git(*words: str) -> str:
    try:
        return subprocess.run(
            ["git", *words], cwd=_ROOT, check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"git {words[0]} does not work here: {error}") from error

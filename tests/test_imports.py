"""What importing a part of jaxserve must not need: checked in fresh interpreters.

import-linter holds the same rules over the source; this sees what really is imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Packages that a bare accelerator image lacks.
MISSING_ON_ACCELERATORS = (
    "starlette", "uvicorn", "opentelemetry", "transformers", "msgspec", "zmq", "gguf",
    "tokenizers", "sentencepiece", "jinja2", "openai", "httpx",
)  # fmt: skip

ENGINE_HALF = ("device", "engine", "scheduler", "models", "sampling", "weights", "bench")
FRONT_HALF = ("http", "text", "limits", "protocol", "formats", "scheduler")

SCRIPT = """
import importlib, json, sys
missing, names = json.loads(sys.argv[1])

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
for name in names:
    importlib.import_module(name)
"""


def modules(parts: tuple[str, ...]) -> list[str]:
    """All modules of these parts of jaxserve."""
    files = [file for part in parts for file in sorted((ROOT / "jaxserve" / part).rglob("*.py"))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def import_without(missing: tuple[str, ...], names: list[str]) -> None:
    """Imports them all in an interpreter in which some packages cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([missing, names])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def kernels() -> list[str]:
    """All modules of pallas_kernels that any machine can import."""
    files = sorted((ROOT / "pallas_kernels").rglob("*.py"))
    return [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in files
    ]


def test_the_engine_half_runs_on_a_bare_accelerator_image() -> None:
    names = modules(ENGINE_HALF)
    assert "jaxserve.engine.loop" in names
    import_without(MISSING_ON_ACCELERATORS, [*names, *kernels()])


@pytest.mark.parametrize("part", FRONT_HALF)
def test_the_front_half_never_imports_jax(part: str) -> None:
    import_without(("jax", "jaxlib", "flax", "orbax", "pallas_kernels"), modules((part,)))


def test_only_who_sends_spans_imports_opentelemetry() -> None:
    """It takes half a second, which no HTTP worker has to spend."""
    names = modules(("http", "telemetry", "protocol"))
    names.remove("jaxserve.telemetry.tracing.otlp")
    import_without(("opentelemetry", "grpc"), names)


def test_importing_jaxserve_imports_nothing_heavy() -> None:
    import_without(("jax", "starlette", "numpy", "zmq"), ["jaxserve", "jaxserve.errors"])

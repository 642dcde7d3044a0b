"""The bare accelerator image: JAX and flax, and none of what serving needs beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What the image lacks.
_MISSING = ("starlette", "opentelemetry", "msgspec", "zmq", "uvicorn", "prometheus_client")
_BLOCKED = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {_MISSING!r}:
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
"""


def run_bare(code: str) -> str:
    """What some code prints there; it must not fail."""
    command = [sys.executable, "-c", _BLOCKED + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

"""Any checkpoint to an Orbax directory, whole or not at all.

The directory holds `config.json` (Hugging Face's keys) and `orbax/` (see `orbax_checkpoint`). The
tokenizer is text's matter: the caller writes it through `finish`, before the directory gets its
name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from jaxserve.errors import ConfigError, WeightsError
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.orbax_checkpoint import FOLDER, import_orbax, tree_of

#: "auto" keeps each tensor's own.
DTYPES: dict[str, Any] = {
    "auto": None,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
#: Told how far it is: "converting" or "writing", tensors done, of how many.
Progress = Callable[[str, int, int], None]


def convert(
    source: Path,
    target: Path,
    dtype: str = "auto",
    *,
    format: str = "auto",
    finish: Callable[[Path], None] = lambda directory: None,
    progress: Progress = lambda phase, done, total: None,
) -> None:
    """Writes a model as an Orbax directory.

    Matrices are held in `dtype`; vectors (norms, biases) stay as they are, since models compute
    with them in float32. Peak memory is about the written tensors' size.

    Args:
        source: what `open_checkpoint` takes.
        target: directory to create.
        dtype: one of DTYPES.
        finish: adds files to the directory before it gets its name.

    Raises:
        ConfigError: an unknown dtype.
        WeightsError: the source is broken, the target exists, or it cannot be written. Nothing is
            left at the target then.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"the dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if os.path.lexists(target):
        raise WeightsError(f"{target} exists: remove it, or give the name of a new directory")
    checkpoint = open_checkpoint(source, format)
    import_orbax()
    target = target.absolute()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        tensors = _tensors(source, checkpoint, dtype, progress)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        config = dict(checkpoint.config)
        if dtype != "auto":
            config["dtype"] = dtype
        config.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        progress("writing", 0, len(tensors))
        # In a thread, so that Ctrl-C waits for Orbax: its own threads would go on writing.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(_save, tensors, partial / FOLDER, num_bytes).result()
        progress("writing", len(tensors), len(tensors))
        finish(partial)
        partial.rename(target)
    except OSError as error:
        raise WeightsError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensors(
    source: Path, checkpoint: Checkpoint, dtype: str, progress: Progress
) -> dict[str, Float[np.ndarray, "..."]]:
    names = sorted(checkpoint.names())
    wanted = DTYPES[dtype]
    tensors = {}
    for done, name in enumerate(names, 1):
        try:
            tensor = checkpoint.read(name)
            if wanted is not None and tensor.ndim > 1:
                with np.errstate(over="raise"):
                    tensor = tensor.astype(wanted, copy=False)
        except (ValueError, FloatingPointError) as error:
            raise WeightsError(f"{source}: tensor {name!r} cannot be {dtype}: {error}") from error
        tensors[name] = tensor
        progress("converting", done, len(names))
    return tensors


def _save(tensors: dict[str, Any], folder: Path, num_bytes: int) -> None:
    ocp = import_orbax()
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree_of(tensors)))
    except WeightsError:
        raise
    except Exception as error:  # Orbax and TensorStore have no common base
        free = shutil.disk_usage(folder.parent).free
        text = " ".join(str(error).split())
        raise WeightsError(
            f"cannot write {num_bytes} bytes of weights to {folder.parent.parent}, where {free} "
            f"bytes are free: {text:.300}"
        ) from error

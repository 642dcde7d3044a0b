"""Loads a checkpoint into a model: abstract → shardings → load.

The model is built abstractly, so it holds no memory; everything that could be wrong with the
checkpoint is looked for; then each parameter is read, built, encoded and put where its sharding
says, a few at a time, so that peak host memory stays near the weights' own size; and of a mixture's
experts near that of a few devices' parts (`weights.experts`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout

from jaxserve.errors import WeightsError
from jaxserve.models.bert import Encoder, encoder_spec, encoder_tensors
from jaxserve.models.decoder import Decoder
from jaxserve.models.hf_tensors import Path as ParamPath
from jaxserve.models.hf_tensors import Rules
from jaxserve.models.linear import encode
from jaxserve.models.options import ModelOptions
from jaxserve.models.registry import model_class
from jaxserve.models.spec import TensorRule
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint
from jaxserve.weights.experts import Place, put_experts
from jaxserve.weights.huge_pages import use_huge_pages
from jaxserve.weights.place import place

logger = logging.getLogger(__name__)

#: Logical axis names and shape of a parameter → where it goes; None is the default device.
Sharding = Callable[[tuple[str | None, ...], tuple[int, ...]], jax.sharding.Sharding | None]
#: Logical axis names of a parameter → how it lies in memory; None as JAX takes it by itself.
LayoutOf = Callable[[tuple[str | None, ...]], Layout | None]
#: Arrays of some parameters, on the host or on their devices.
Built = Mapping[ParamPath, np.ndarray | jax.Array]
#: Told how far loading is: "loading", parameters done, of how many.
Progress = Callable[[str, int, int], None]

#: Parts of tensor names that checkpoints hold and no model needs.
_IGNORED = (
    *("rotary_emb.inv_freq", "lm_head.weight", "vision_tower.", "multi_modal_projector."),
    *("embeddings.position_ids", "pooler.dense."),
)
_NAMED = 3


def load_model(
    path: Path,
    *,
    options: ModelOptions,
    format: str = "auto",
    sharding: Sharding | None = None,
    layout: LayoutOf = lambda axes: None,
    progress: Progress = lambda phase, done, total: None,
) -> Decoder:
    """The model at a path, its weights on their devices.

    Args:
        path, format: as `open_checkpoint` takes them.
        sharding: where each parameter goes; the default device where None.
        layout: how it lies there.

    Raises:
        WeightsError: the checkpoint is missing, broken, or lacks tensors.
        UnsupportedModel: its architecture or a feature of it is not implemented.
    """
    checkpoint = open_checkpoint(path, format)
    kind = model_class(checkpoint.config)
    spec = kind.spec_from_hf(checkpoint.config).spread(options.tensor_parallel)
    model = nnx.eval_shape(lambda: kind(spec, options, rngs=nnx.Rngs(0)))
    _fill(model, path, checkpoint, kind.hf_tensors(spec, options), sharding, progress, layout)
    return model


def load_encoder(
    path: Path,
    *,
    options: ModelOptions,
    format: str = "auto",
    sharding: Sharding | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Encoder:
    """The encoder at a path, its weights on their devices; takes and raises as `load_model`."""
    checkpoint = open_checkpoint(path, format)
    spec = encoder_spec(checkpoint.config, checkpoint.names())
    model = nnx.eval_shape(lambda: Encoder(spec, options, rngs=nnx.Rngs(0)))
    _fill(model, path, checkpoint, encoder_tensors(spec), sharding, progress)
    return model


def _fill(
    model: Decoder | Encoder,
    path: Path,
    checkpoint: Checkpoint,
    rules: Rules,
    sharding: Sharding | None,
    progress: Progress,
    layout: LayoutOf = lambda axes: None,
) -> None:
    """Gives an abstract model its arrays."""
    _check(path, checkpoint, rules)
    params = model.params()

    def where(param: nnx.Param) -> jax.sharding.Sharding | None:
        return None if sharding is None else sharding(param.get_metadata("axes"), param.shape)

    for put, arrays in enumerate(_built(checkpoint, params, rules, where), 1):
        for param_path, held in arrays.items():
            param = params[param_path]
            if not isinstance(held, jax.Array):  # experts are on their devices already
                held = place(held, where(param), layout(param.get_metadata("axes")))
            param.set_value(held)
        progress("loading", put, len(rules))
    arrays = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    if model.options.packed:
        use_huge_pages(arrays)


def _built(
    checkpoint: Checkpoint,
    params: dict[ParamPath, nnx.Param],
    rules: Rules,
    where: Place,
) -> Iterator[Built]:
    """Each rule's arrays as they are held, on the host still; built in threads, a few ahead.

    Those of experts are on their devices already.
    """

    def dense(rule: TensorRule) -> np.ndarray:
        return rule.build([checkpoint.read(name) for name in rule.names])

    def build(param_path: ParamPath, rule: TensorRule) -> Built:
        try:
            with np.errstate(over="raise"):
                if (rule.layers or (rule,))[0].experts:
                    return put_experts(params, param_path, rule, checkpoint.read, where)
                if not rule.layers:
                    return encode(params, param_path, dense(rule))
                return encode(params, param_path, map(dense, rule.layers))
        except ValueError as error:
            raise WeightsError(f"tensor {rule.names[0]!r}: {error}") from error
        except FloatingPointError:
            raise WeightsError(
                f"tensor {rule.names[0]!r} holds values beyond the range of "
                f"{params[param_path].dtype}: set weights.dtype to bfloat16 or float32"
            ) from None

    workers = os.cpu_count() or 1
    pending: list[Future[Built]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="jaxserve loading") as pool:
        for param_path, rule in rules.items():
            pending.append(pool.submit(build, param_path, rule))
            if len(pending) > workers:
                yield pending.pop(0).result()
        for done in pending:
            yield done.result()


def _check(path: Path, checkpoint: Checkpoint, rules: Rules) -> None:
    """Names whatever is missing or has a wrong shape, and logs what nobody asks for."""
    names, faults, used = checkpoint.names(), [], set()
    for rule in rules.values():
        for name, shape in zip(rule.names, rule.shapes, strict=True):
            used.add(name)
            if name not in names:
                faults.append(f"{name!r} is missing")
            elif checkpoint.shape(name) != shape:
                faults.append(
                    f"{name!r} has shape {checkpoint.shape(name)}, the config asks for {shape}"
                )
    if faults:
        more = f", and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise WeightsError(f"{path} does not fit its config: {'; '.join(faults[:_NAMED])}{more}")
    unused = sorted(n for n in names - used if not any(part in n for part in _IGNORED))
    if unused:
        logger.warning("%s: %d tensors are not used, e.g. %s", path, len(unused), unused[0])

"""What a configuration would be on chips that are not here: shapes, bytes, and step programs.

Everything is as `load` makes it, without a weight: the model is abstract, the mesh may be. Used by
`doctor --topology`, which only counts, and by `benchmarks.compile_check`, which compiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxserve.config import Config
from jaxserve.device.buckets import Buckets
from jaxserve.device.cache import bytes_of_page, init_cache, pages_per_sequence
from jaxserve.device.chips import Slice
from jaxserve.device.executor import Executor
from jaxserve.device.layouts import param_layout
from jaxserve.device.memory import Memory
from jaxserve.device.sharding import (
    MESH_AXES,
    by_data,
    mesh_shape,
    num_shares,
    pages_sharding,
    partition,
    tensor_parallel,
)
from jaxserve.device.state import DeviceState, fresh_state, hidden_states
from jaxserve.device.step import Program
from jaxserve.engine.hopper import with_experts_kernel
from jaxserve.engine.load import buckets_for, cache_dtype, model_info, size_cache
from jaxserve.engine.lora import check_slots, slot_bytes
from jaxserve.engine.machine import fitting, model_options
from jaxserve.errors import ConfigError
from jaxserve.models.decoder import Decoder
from jaxserve.models.registry import model_class
from jaxserve.types import ModelInfo


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A model on a slice of chips, without its weights.

    Attributes:
        config: that it is made from.
        model: abstract; `params` has each parameter's shape and axes.
        mesh: an AbstractMesh, or one of devices that can be compiled for.
        weights_bytes, adapter_bytes: of one device; the adapters' by the parts of a slot.
    """

    config: Config
    slice: Slice
    model: Decoder
    mesh: Mesh | AbstractMesh
    info: ModelInfo
    weights_bytes: int
    adapter_bytes: dict[str, int]

    @property
    def cache_dtype(self) -> str:
        """Of the pages."""
        return cache_dtype(self.config.cache, self.model.options)

    @property
    def memory(self) -> Memory:
        """Of one device, with the weights and the adapters in it."""
        return self.slice.memory.less(self.weights_bytes + sum(self.adapter_bytes.values()))

    @property
    def buckets(self) -> Buckets:
        """The step programs."""
        chip = self.slice.chip
        return buckets_for(self.config, self.model.options, chip.platform)

    def num_pages(self) -> tuple[int, ...]:
        """Pages of each cache group's pool, in each copy of the model.

        Raises:
            ConfigError: they do not fit beside weights and adapters, or those do not fit.
        """
        total = self.slice.memory.total_bytes
        if self.weights_bytes > total:
            raise ConfigError(
                f"the weights need {self.weights_bytes >> 20} MiB of each device, which has "
                f"{total >> 20}: use more chips, or weights.quantization"
            )
        memory = self.slice.memory.less(self.weights_bytes)
        check_slots(self.config.lora, self.adapter_bytes, memory)
        return size_cache(self.config, self.model.options, self.info, self.memory)

    def page_bytes(self) -> int:
        """Of one page of each cache group, on one device."""
        parts, page_size = self.model.options.tensor_parallel, self.config.cache.page_size
        groups = (
            replace(group, num_kv_heads=group.num_kv_heads // parts)
            for group in self.info.cache_groups
        )
        backend = self.model.options.attention
        return sum(bytes_of_page(group, page_size, self.cache_dtype, backend) for group in groups)

    def step_seconds(self, num_rows: int, context: int) -> float:
        """The least that a decode step can take: its bytes, or its operations, at full speed.

        Counts no communication between devices.

        Args:
            num_rows: of each copy of the model.
            context: positions of each row.
        """
        flops, num_bytes = self.model.count_work(num_rows, num_rows, num_rows * context)
        share = self.model.options.tensor_parallel
        chip = self.slice.chip
        return max(num_bytes / share / chip.bandwidth, flops / share / chip.flops)

    def executor(self, program: Program, num_pages: tuple[int, ...]) -> Executor:
        """One that can lower this program, and do nothing else; the mesh must have devices."""
        assert isinstance(self.mesh, Mesh)
        mesh = self.mesh
        for param in self.model.params().values():
            axes = param.get_metadata("axes")
            sharding = NamedSharding(mesh, partition(mesh, axes, param.shape))
            layout = param_layout(axes, self.slice.chip.platform)
            where = sharding if layout is None else Format(layout, sharding)
            param.set_value(_placed(param.get_value(), where))
        return Executor(
            self.model,
            self._state(mesh, num_pages),
            [program],
            self.config.cache.page_size,
            mesh,
        )

    def _state(self, mesh: Mesh, num_pages: tuple[int, ...]) -> DeviceState:
        page_size = self.config.cache.page_size
        cache = jax.eval_shape(
            lambda: init_cache(
                self.info.cache_groups,
                num_pages,
                page_size=page_size,
                dtype=self.cache_dtype,
                mesh=mesh,
                backend=self.model.options.attention,
            )
        )
        spec, dtype = self.model.spec, self.model.options.activations
        hidden = hidden_states(self.buckets.programs, spec.hidden_size, dtype)
        state = jax.eval_shape(
            lambda: fresh_state(
                len(cache.groups),
                num_slots=mesh.shape["data"] * (self.config.scheduler.max_rows + 1),
                vocab_size=self.info.vocab_size,
                pages_per_sequence=pages_per_sequence(self.info.max_context, page_size),
                hidden=(mesh.shape["data"] * hidden.shape[0], *hidden.shape[1:]),
                dtype=dtype,
            )
        )
        state = jax.tree.map(lambda x: _placed(x, by_data(mesh)), state)
        return replace(state, cache=jax.tree.map(lambda x: _placed(x, pages_sharding(mesh)), cache))


def _placed(x: Any, where: NamedSharding | Format) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def ahead_of_time(
    config: Config, checkpoint: Mapping[str, Any], slice: Slice, mesh: Mesh | None = None
) -> Ahead:
    """A checkpoint's model on a slice.

    Args:
        checkpoint: its config.json.
        mesh: of the slice's devices; an abstract one of their number where None.

    Raises:
        ConfigError: settings that fit neither the chips nor the model.
        UnsupportedModel: the model is not implemented.
    """
    sizes = mesh_shape(slice.num_devices, config.parallel)
    on = mesh or AbstractMesh(sizes, MESH_AXES)
    platform, capability = slice.chip.platform, slice.chip.capability
    kind = model_class(dict(checkpoint))
    spec = kind.spec_from_hf(dict(checkpoint)).spread(tensor_parallel(on))
    options = model_options(
        config.weights, config.kernels, platform, on, capability, mixture=spec.moe is not None
    )
    dtype = cache_dtype(config.cache, options)
    options = fitting(options, config.kernels, spec.attention.head_dim, dtype)
    options = with_experts_kernel(
        options, config.kernels, spec, platform, capability, on.shape["model"]
    )
    model = nnx.eval_shape(lambda: kind(spec, options, rngs=nnx.Rngs(0)))
    return Ahead(
        config=config,
        slice=slice,
        model=model,
        mesh=on,
        info=model_info(config, model),
        weights_bytes=sum(_bytes_on_a_device(on, param) for param in model.params().values()),
        adapter_bytes=slot_bytes(config.lora, model, on),
    )


def _bytes_on_a_device(mesh: Mesh | AbstractMesh, param: nnx.Param) -> int:
    shares = num_shares(mesh, partition(mesh, param.get_metadata("axes"), param.shape))
    bits = jax.numpy.iinfo(param.dtype).bits if param.dtype.name == "uint4" else None
    num_bits = bits or 8 * param.dtype.itemsize
    return math.prod(param.shape) * num_bits // 8 // shares

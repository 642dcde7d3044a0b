"""Compiles one row and holds it against what is expected of it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.compile_check import targets
from benchmarks.compile_check.grouped import GroupedRow
from benchmarks.compile_check.hlo import collectives, kernels
from benchmarks.compile_check.kernels import KernelRow
from benchmarks.compile_check.lora import LoraRow
from benchmarks.compile_check.quant import QuantRow
from benchmarks.compile_check.steps import ROWS, StepRow

KernelRows = KernelRow | LoraRow | GroupedRow | QuantRow
Row = StepRow | KernelRows

#: A prefill step's temporary memory, as a share of its cache: a hidden copy would be all of it.
MOST_TEMP = 0.1
#: All-reduces of a layer: behind attention and behind the MLP.
IN_A_LAYER = 2
#: Bytes of sampling's exchanges, for one row and device, beside its own logits' all-to-all.
SAMPLING_BYTES_A_ROW = 1024


@dataclass(slots=True)
class Result:
    """What became of a row.

    Attributes:
        verdict: "compiles", "refused" or "failed".
        expected: what it should have been.
        detail: why it was refused or failed.
        faults: what does not hold of a program that compiles.
        temp_bytes, argument_bytes: of one device.
        kernels: of a site of adapters on a GPU.
    """

    name: str
    verdict: str
    expected: str
    detail: str = ""
    faults: list[str] = field(default_factory=list)
    attention: str = ""
    weights_bytes: int = 0
    cache_bytes: int = 0
    temp_bytes: int = 0
    argument_bytes: int = 0
    in_layer: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    kernels: int = 0
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether all is as expected."""
        return self.verdict == self.expected and not self.faults

    def as_dict(self) -> dict[str, Any]:
        """For a JSON line."""
        return asdict(self) | {"holds": self.holds}


def check(row: Row) -> Result:
    """Compiles a row; anything that the compiler says against it is its verdict."""
    start = time.monotonic()
    result = _step(row) if isinstance(row, StepRow) else _kernel(row)
    result.seconds = round(time.monotonic() - start, 1)
    return result


def compile_for(lowered: Any, device: Any) -> Any:
    """An executable for a device that may not be here."""
    from jaxserve.device.compiles import compiler_options

    options = compiler_options(device.device_kind) or {}
    if device.platform == "gpu":
        # Sorting by CUB would ask a GPU at compile time how much scratch memory it takes.
        options = {**options, "xla_gpu_enable_cub_radix_sort": False}
    return lowered.compile(compiler_options=options)


def _kernel(row: KernelRows) -> Result:
    import jax

    from jaxserve.device.chips import parse_slice
    from pallas_kernels import UnsupportedKernel

    slice = parse_slice(row.slice)
    result = Result(row.name, "compiles", "compiles" if row.refusal is None else "refused")
    result.cache_bytes = row.page_bytes
    mesh = targets.mesh(slice, targets.one_each(slice))
    function, arguments = row.program(mesh.devices.flat[0])
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(function, donate_argnums=0).trace(*arguments)
            lowered = traced.lower(lowering_platforms=targets.platforms(slice))
        compiled = compile_for(lowered, mesh.devices.flat[0])
    except UnsupportedKernel as error:
        result.verdict, result.detail = "refused", str(error)
        if row.refusal is not None and row.refusal not in result.detail:
            result.faults.append(f"not refused because {row.refusal}")
        return result
    except Exception as error:
        return _failed(result, error)
    _memory(result, compiled)
    if isinstance(row, LoraRow) and row.num_kernels:
        result.kernels = kernels(compiled.as_text(), "lora_matmul")
        if result.kernels > row.num_kernels:
            result.faults.append(f"{result.kernels} kernels, not {row.num_kernels}")
    return result


def _step(row: StepRow) -> Result:
    import jax

    from jaxserve.device.chips import parse_slice
    from jaxserve.engine.ahead import ahead_of_time
    from jaxserve.errors import ConfigError

    slice, config = parse_slice(row.slice), row.config
    result = Result(row.name, "compiles", "compiles" if row.fits else "refused")
    mesh = targets.mesh(slice, config.parallel)
    ahead = ahead_of_time(config, row.checkpoint, slice, mesh)
    result.attention = ahead.model.options.attention
    result.weights_bytes = ahead.weights_bytes
    try:
        num_pages = ahead.num_pages()
    except ConfigError as error:
        result.verdict, result.detail = "refused", error.message
        return result
    result.cache_bytes = num_pages[0] * ahead.page_bytes()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            executor = ahead.executor(row.program, num_pages)
            lowered = executor.lower(row.program, targets.platforms(slice))
        compiled = compile_for(lowered, mesh.devices.flat[0])
    except Exception as error:
        return _failed(result, error)
    _memory(result, compiled, MOST_TEMP * result.cache_bytes if row.kind == "prefill" else 0)
    if mesh.size > 1:
        found = list(collectives(compiled.as_text()))
        _communication(result, found, ahead.model, mesh.size)
    return result


def _communication(result: Result, found: list[Any], model: Any, size: int) -> None:
    written = 1 if model.options.layers == "scanned" else model.spec.num_layers
    in_layer = [f"{c.op} {c.num_bytes}" for c in found if c.in_layer]
    result.in_layer = in_layer[: -(-len(in_layer) // written)]
    result.outside = [f"{c.op} {c.num_bytes}" for c in found if not c.in_layer]
    if in_layer != result.in_layer * written:
        result.faults.append(f"layers differ: {in_layer}")
    ops = [c.op for c in found if c.in_layer]
    if ops != ["all-reduce"] * IN_A_LAYER * written:
        result.faults.append(f"{written} layers have {ops or 'no exchange'}")
    own_logits = ROWS * model.spec.vocab_size * 4 // size
    for c in found:
        if c.op == "all-gather" and c.num_bytes > ROWS * SAMPLING_BYTES_A_ROW:
            result.faults.append(f"an all-gather of {c.num_bytes} bytes")
        if c.op == "all-to-all" and c.num_bytes > 1.1 * own_logits:
            result.faults.append(f"an all-to-all of {c.num_bytes} bytes")
    embeddings = [c for c in found if not c.in_layer and c.op == "all-reduce"]
    large = [c for c in embeddings if c.num_bytes > ROWS * SAMPLING_BYTES_A_ROW]
    if len(large) > 1:
        result.faults.append(f"{len(large)} large all-reduces outside the layers")


def _memory(result: Result, compiled: Any, most: float = 0) -> None:
    memory = compiled.memory_analysis()
    result.temp_bytes = memory.temp_size_in_bytes
    result.argument_bytes = memory.argument_size_in_bytes
    if result.temp_bytes > max(most, _SMALL):
        result.faults.append(f"{result.temp_bytes} temporary bytes")
    if memory.alias_size_in_bytes < result.cache_bytes:
        result.faults.append("the cache is not updated in place")


#: Temporary bytes that anything may take; a decode step may not take more. A layer's weights,
#: copied in front of it, would be more of the larger models.
_SMALL = 256 << 20


def _failed(result: Result, error: Exception) -> Result:
    result.verdict = "failed"
    result.detail = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return result

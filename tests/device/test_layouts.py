"""Parameters whose axes lie in another order in memory are computed with all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.device import layouts
from jaxserve.device.layouts import param_layout
from jaxserve.device.sharding import param_sharding
from jaxserve.models.options import ModelOptions
from jaxserve.weights.load import load_model
from tests.device.rig import LIMITS, MESH, Rig, next_tokens, prompt_of, warm
from tests.models.loading import ORACLE, load_tiny

GATE_UP = ("embed", None, "mlp")


def test_gate_and_up_lie_one_behind_the_other_on_a_tpu() -> None:
    for axes, order in ((GATE_UP, (1, 0, 2)), (("layers", *GATE_UP), (0, 2, 1, 3))):
        layout = param_layout(axes, "tpu")
        assert layout is not None and layout.major_to_minor == order
        assert param_layout(axes, "gpu") is None
    assert param_layout(("layers", "mlp", "embed"), "tpu") is None
    assert param_layout((None, "mlp"), "tpu") is None


def test_a_model_that_lies_so_serves_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU, for which nothing is laid out anew by itself."""
    monkeypatch.setattr(layouts, "_PLATFORM", "cpu")
    options = ModelOptions(layers="scanned", quantization="int8")
    limits = replace(LIMITS, max_rows=1, max_step_tokens=8, decode_steps=1)
    model = load_model(
        ORACLE / "llama3",
        options=options,
        sharding=param_sharding(MESH),
        layout=lambda axes: param_layout(axes, "cpu"),
    )
    orders = {
        path: param.get_value().format.layout.major_to_minor
        for path, param in model.params().items()
        if param.ndim == 4
    }
    moved = [path for path, order in orders.items() if order == (0, 2, 1, 3)]
    assert moved == [path for path in orders if "gate_up" in path] != []
    prompt = prompt_of(12)
    expected = next_tokens(load_tiny("llama3", options), prompt, 3)
    assert Rig(warm(model, limits)).generate(prompt, max_tokens=3) == expected

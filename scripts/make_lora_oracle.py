"""Makes the adapters and logits under tests/data/lora that the tests compare with.

Run where torch, transformers and peft are installed; the project never needs them:

    python scripts/make_lora_oracle.py tests/data/lora tests/data/oracle [CASE ...]

The cases of a mixture need transformers 4, where each expert's matrices are modules; from version 5
on they are stacked parameters, which peft names otherwise.

For each case: an adapter that peft itself made and saved, with random matrices, over one of the
small checkpoints of scripts/make_oracle.py, and all logits that peft's model gives for that
checkpoint's prompt, in float32, unmerged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers
from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

#: Case: the base checkpoint, and peft's settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("llama3", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "linear": ("qwen2_tied", {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"}),
    "patterns": (
        "llama3",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\..*up_proj": 7},
            "alpha_pattern": {"down_proj": 3, "model.layers.0.self_attn.q_proj": 16},
            "layers_to_transform": [0, 1],
        },
    ),
    "vocabulary": (
        "llama3",
        {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
    ),
    "gemma": (
        "gemma2",
        {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "v_proj", "down_proj"]},
    ),
    "mixtral": (
        "mixtral",
        {
            "r": 3,
            "lora_alpha": 6,
            "target_modules": ["v_proj", "gate", "w1", "w2", "w3"],
            "rank_pattern": {r"experts\.[01]\.w2": 2},
            "alpha_pattern": {r"layers\.1\..*\.w1": 4},
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"r": 1, "lora_alpha": 2, "use_rslora": True, "target_modules": "all-linear"},
    ),
}
#: Cases that need transformers 4.
MIXTURES = ("mixtral", "qwen3_moe")


def main() -> int:
    """Writes all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("target", type=Path, help="folder to write to")
    parser.add_argument("bases", type=Path, help="folder of the small checkpoints")
    parser.add_argument("cases", nargs="*", help="all that this transformers can make where none")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    old = transformers.__version__.startswith("4.")
    for name in arguments.cases or [name for name in CASES if (name in MIXTURES) == old]:
        base, settings = CASES[name]
        make(arguments.target / name, arguments.bases / base, settings)
    return 0


def config_of(base: Path) -> Any:
    """A checkpoint's config; what transformers 5 wrote, also in the words of transformers 4."""
    fields = json.loads((base / "config.json").read_text())
    if transformers.__version__.startswith("4."):
        if "num_local_experts" in fields:
            fields["num_experts"] = fields["num_local_experts"]
        rope = fields.pop("rope_parameters", None) or {}
        fields["rope_theta"] = rope.get("rope_theta", 10000.0)
    return transformers.AutoConfig.for_model(**fields)


def make(folder: Path, base: Path, settings: dict[str, Any]) -> None:
    """One adapter, and its logits."""
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, config=config_of(base), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference = np.load(base / "reference.npz")
    prompt = torch.from_numpy(reference["tokens"].astype(np.int64))[None]
    plain = model(input_ids=prompt).logits[0]
    np.testing.assert_allclose(plain.numpy(), reference["logits"], atol=1e-4, rtol=0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    for key, weight in adapted.named_parameters():
        if "lora_" in key:
            weight.copy_(0.15 * torch.randn(weight.shape, generator=generator))
    logits = adapted(input_ids=prompt).logits[0]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        adapted.save_pretrained(saved)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes((Path(saved) / file).read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base.name  # no path of the machine that made it
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "logits.npz", logits=logits.numpy())
    changed = (logits - plain).abs().max()
    print(f"{folder.name}: {len(tensors)} tensors, logits changed by up to {changed:.2f}")


if __name__ == "__main__":
    sys.exit(main())

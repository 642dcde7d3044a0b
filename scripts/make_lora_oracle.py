"""Makes the adapters and logits under tests/data/lora that the tests compare with.

Run where torch, transformers and peft are installed; the project never needs them:

    python scripts/make_lora_oracle.py tests/data/lora tests/data/oracle

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
}


def main() -> int:
    """Writes all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("target", type=Path, help="folder to write to")
    parser.add_argument("bases", type=Path, help="folder of the small checkpoints")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    for name, (base, settings) in CASES.items():
        make(arguments.target / name, arguments.bases / base, settings)
    return 0


def make(folder: Path, base: Path, settings: dict[str, Any]) -> None:
    """One adapter, and its logits."""
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = np.load(base / "reference.npz")["tokens"]
    prompt = torch.from_numpy(tokens.astype(np.int64))[None]
    plain = model(input_ids=prompt).logits[0]
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

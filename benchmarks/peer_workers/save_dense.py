"""A GGUF file's weights as a directory with dense float32 tensors, which vLLM wants.

Arguments: GGUF FILE, FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
import transformers


def save_dense(file: Path, folder: str) -> None:
    """Weights, configuration and tokenizer, saved by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    save_dense(Path(sys.argv[1]), sys.argv[2])

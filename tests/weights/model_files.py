"""The files of a small model as repositories and buckets hold them, and whether all are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxserve.models.options import ModelOptions
from jaxserve.text.template_files import find_template
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.weights.load import load_model
from tests.models.loading import ORACLE, load_tiny

#: What of `tiny` is served.
SERVED = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "additional_chat_templates/tool_use.jinja",
}


def tiny() -> dict[str, bytes]:
    """The small Llama of the oracle with a tokenizer, and what else may lie beside a model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return {
        "config.json": (ORACLE / "llama3" / "config.json").read_bytes(),
        "model.safetensors": (ORACLE / "llama3" / "model.safetensors").read_bytes(),
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": b'{"eos_token": "<|end|>", "chat_template": "plain"}',
        "additional_chat_templates/tool_use.jinja": b"with tools",
        "README.md": b"# Tiny",
        "pytorch_model.bin": b"pickled",
        "original/consolidated.00.pth": b"pickled too",
        "original/model.safetensors": b"the same in another layout",
    }


def check_tiny(directory: Path) -> None:
    """The fetched files are a model: its parameters, tokenizer and templates are all there."""
    check_parameters(directory)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode("across the wire")) == "across the wire"
    template = find_template(directory)
    assert (template.source, template.tools_source) == ("plain", "with tools")
    assert template.special_tokens == {"eos_token": "<|end|>"}


def check_parameters(directory: Path) -> None:
    """They are the small Llama's."""
    options = ModelOptions()
    ours, expected = load_model(directory, options=options).params(), load_tiny("llama3", options)
    assert ours.keys() == expected.params().keys()
    for path, param in expected.params().items():
        np.testing.assert_array_equal(
            np.asarray(ours[path].get_value()), np.asarray(param.get_value())
        )


def files_in(directory: Path) -> set[str]:
    """Names of all files below a directory."""
    return {
        file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()
    }

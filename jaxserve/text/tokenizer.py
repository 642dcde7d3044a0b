"""Text to token ids and back: the interface, and the choice of the implementation by what is there.

The front end encodes prompts with a `Tokenizer` and turns output tokens into text with
`choice.ChoiceText`; the engine never sees text. Implementations: `fast` (a tokenizer.json),
`gguf` (the vocabulary inside a GGUF file), `sentence_piece` (a .model file).

Invariants: no JAX, no torch, no transformers. All methods may be called from several threads. Text
is the concatenation of `token_bytes`, read as UTF-8: nothing else decides what a token says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jaxserve.errors import WeightsError


class Tokenizer(Protocol):
    """A model's vocabulary.

    Attributes:
        vocab_size: ids are below it. A model may have more logits than that; such ids are empty.
        eos_token_ids: tokens after which the model's own generation ends.
        strips_first_space: a space that begins the first word is the tokenizer's, not the text's
            (SentencePiece's dummy prefix), and is left out where text begins.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def strips_first_space(self) -> bool: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in the text become those tokens.

        Args:
            add_special_tokens: put the tokens around it that the model expects (usually a first
                one); False for text that has them, as chat templates write them.

        Raises:
            InvalidRequest: the text is not Unicode text (a lone surrogate).
        """
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly what a token adds to the text; empty for an id outside the vocabulary."""
        ...

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it ("Ġthe", "▁the", "<0x0A>")."""
        ...

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token: not part of the text unless asked for."""
        ...


def load_tokenizer(path: Path, override: str = "") -> Tokenizer:
    """The tokenizer of a model.

    Args:
        path: a model's directory or .gguf file; or a tokenizer.json or .model file.
        override: path to take it from instead, of any of these kinds.

    Raises:
        WeightsError: there is none, it is broken, or of a kind that is not supported.
    """
    path = Path(override).expanduser() if override else path
    file = _tokenizer_file(path) if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"there is no tokenizer at {path}: no such file or directory")
    if file.suffix == ".json":
        from jaxserve.text.fast import load_json

        return load_json(file)
    if file.suffix == ".model":
        from jaxserve.text.sentence_piece import load_model

        return load_model(file)
    if file.suffix == ".gguf":
        from jaxserve.text.gguf import load_gguf

        return load_gguf(file)
    raise WeightsError(
        f"{file} is not a tokenizer: give a directory, a tokenizer.json, a .model or a .gguf file"
    )


def _tokenizer_file(directory: Path) -> Path:
    for pattern in ("tokenizer.json", "tokenizer.model", "*.model", "*.gguf"):
        found = sorted(directory.glob(pattern))
        if found:
            return found[0]
    raise WeightsError(
        f"{directory} has no tokenizer: neither tokenizer.json nor tokenizer.model nor a .gguf "
        "file; give model.tokenizer"
    )

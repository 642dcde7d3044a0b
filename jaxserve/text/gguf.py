"""The tokenizer inside a GGUF file.

Two kinds of vocabulary: "gpt2", byte-level BPE by a list of merges, and "llama", SentencePiece BPE
by scores with byte fallback. Each is handed to the library that runs its kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from jaxserve.errors import UnsupportedModel, WeightsError
from jaxserve.formats.gguf_header import read_gguf_header
from jaxserve.formats.sentence_piece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    write_model,
)
from jaxserve.text.fast import FastTokenizer
from jaxserve.text.pieces import PieceTokenizer
from jaxserve.text.pre_tokenizers import pre_tokenizing
from jaxserve.text.sentence_piece import SentencePieceTokenizer

#: Control tokens that end a turn, whether or not the file names them as end tokens.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end_of_text|>")


def load_gguf(file: Path) -> PieceTokenizer:
    """The tokenizer that a GGUF file carries.

    Raises:
        UnsupportedModel: its kind is not supported.
        WeightsError: the file is broken or has no tokenizer.
    """
    return from_metadata(read_gguf_header(file).metadata, str(file))


def from_metadata(metadata: dict[str, Any], name: str) -> PieceTokenizer:
    """The tokenizer that a GGUF file's metadata describes; name: of the file, for messages."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise WeightsError(f"{name} has no tokenizer; give model.tokenizer")
    tokens, types = _vocabulary(metadata, name)
    if kind == "gpt2":
        return _byte_level(metadata, tokens, types, name)
    if kind == "llama":
        return _by_score(metadata, tokens, types, name)
    raise UnsupportedModel(
        f"{name} has a tokenizer of kind {kind!r}; gpt2 and llama are supported, for others give "
        "the model's own tokenizer.json as model.tokenizer"
    )


def _byte_level(
    metadata: dict[str, Any], tokens: list[str], types: list[int], name: str
) -> FastTokenizer:
    pre = pre_tokenizing(str(metadata.get("tokenizer.ggml.pre", "default")))
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)},
                merges=merges,  # type: ignore[arg-type]
                ignore_merges=pre.whole_words,
            )
        )
    except Exception as error:  # the library raises bare Exceptions
        raise WeightsError(f"{name} has a broken vocabulary: {error}") from error
    pre.apply(backend)
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        texts = [token for token, given in zip(tokens, types, strict=True) if given == kind]
        backend.add_tokens(
            [
                tokenizers.AddedToken(text, special=special, normalized=False)
                for text in texts
                if text
            ]
        )
    return FastTokenizer(
        backend,
        eos_token_ids=_end_ids(metadata, tokens, types),
        frame=_frame(metadata, tokens, add_bos=pre.add_bos),
    )


def _by_score(
    metadata: dict[str, Any], tokens: list[str], types: list[int], name: str
) -> SentencePieceTokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise WeightsError(f"{name} has no score for each of its {len(tokens)} tokens")
    pieces, kinds = _distinct(tokens, types)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if UNKNOWN not in kinds and 0 <= unknown < len(kinds):
        kinds[unknown] = UNKNOWN
    model = write_model(
        pieces,
        scores,
        kinds,
        add_dummy_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        byte_fallback=kinds.count(BYTE) == 256,
    )
    before, after = _frame(metadata, tokens, add_bos=True)
    return SentencePieceTokenizer(
        model,
        name=name,
        added={},
        special_ids=[],
        before=before,
        after=after,
        legacy=True,
        eos_token_ids=_end_ids(metadata, tokens, types),
        texts=tokens,
    )


def _vocabulary(metadata: dict[str, Any], name: str) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise WeightsError(f"{name} has no list of tokens; give model.tokenizer")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise WeightsError(f"{name} has {len(tokens)} tokens, but {len(types)} token types")
    return tokens, types


def _distinct(tokens: list[str], types: list[int]) -> tuple[list[str], list[int]]:
    """Pieces as SentencePiece wants them: an empty or repeated one takes part in nothing."""
    seen: set[str] = set()
    pieces, kinds = [], []
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        usable = bool(token) and token not in seen and "\x00" not in token
        pieces.append(token if usable else f"\ue000{i}")
        kinds.append((kind if NORMAL <= kind <= BYTE else NORMAL) if usable else UNUSED)
        seen.add(token)
    return pieces, kinds


def _frame(
    metadata: dict[str, Any], tokens: list[str], *, add_bos: bool
) -> tuple[list[int], list[int]]:
    """Ids before and after a text."""
    before, after = [], []
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        before = [metadata.get("tokenizer.ggml.bos_token_id")]
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        after = [metadata.get("tokenizer.ggml.eos_token_id")]
    size = len(tokens)
    return _ids(before, size), _ids(after, size)


def _end_ids(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> list[int]:
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    turns = [i for i, t in enumerate(tokens) if types[i] == CONTROL and t in _END_OF_TURN]
    return list(dict.fromkeys(_ids([*named, *turns], len(tokens))))


def _ids(candidates: list[Any], size: int) -> list[int]:
    return [i for i in candidates if isinstance(i, int) and 0 <= i < size]

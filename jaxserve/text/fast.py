"""Tokenizers that the `tokenizers` library runs: a tokenizer.json, or a vocabulary built in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jaxserve.errors import InvalidRequest, WeightsError
from jaxserve.text.pieces import PieceTokenizer, spell_byte_level, spell_sentence_piece
from jaxserve.text.template_files import read_json, token_text


def load_json(file: Path) -> FastTokenizer:
    """A tokenizer.json, with the tokenizer_config.json and generation_config.json beside it.

    Raises:
        WeightsError: a file is broken, or its kind of decoder is not supported.
    """
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise WeightsError(f"cannot read the tokenizer {file}: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = read_json(file.parent / "tokenizer_config.json")
    bos = _special_id(backend, config.get("bos_token"))
    eos = _special_id(backend, config.get("eos_token"))
    frame: tuple[list[int], list[int]] | None = None
    if "add_bos_token" in config or "add_eos_token" in config:
        # As transformers: then these two decide, not the file's own post-processor.
        frame = (
            [bos] if config.get("add_bos_token") and bos is not None else [],
            [eos] if config.get("add_eos_token") and eos is not None else [],
        )
    return FastTokenizer(backend, eos_token_ids=stop_ids(file.parent, eos), frame=frame)


def stop_ids(directory: Path, eos: int | None) -> list[int]:
    """The tokens that end generation: generation_config.json's, then the tokenizer's own."""
    listed = read_json(directory / "generation_config.json").get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    return list(dict.fromkeys(i for i in [*ids, eos] if isinstance(i, int)))


#: Longer texts are encoded as a batch of one: the library then lets go of the interpreter, which
#: `encode` holds to its end, whatever thread it runs in.
_SHORT_CHARACTERS = 2048


class FastTokenizer(PieceTokenizer):
    """A `Tokenizer` over the `tokenizers` library, which encodes outside the interpreter lock.

    Args:
        frame: ids to put before and after a text; None leaves that to the backend.

    Raises:
        WeightsError: how the backend spells its pieces is not known here.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        frame: tuple[list[int], list[int]] | None = None,
    ) -> None:
        added = backend.get_added_tokens_decoder()
        contents = {token_id: token.content.encode() for token_id, token in added.items()}
        kinds = _decoder_kinds(backend)
        if "ByteLevel" in kinds:
            spell_piece = spell_byte_level
        elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
            spell_piece = spell_sentence_piece
        else:
            raise WeightsError(
                f"tokenizers with a decoder of {sorted(kinds) or 'no kind'} are not supported: "
                "byte-level and SentencePiece-like ones are"
            )

        def spell(token_id: int, piece: str) -> bytes:
            content = contents.get(token_id)
            return spell_piece(piece) if content is None else content

        super().__init__(
            vocab_size=_size(backend),
            spell=spell,
            special_ids=[token_id for token_id, token in added.items() if token.special],
            eos_token_ids=eos_token_ids,
            strips_first_space=_strips_first_space(backend),
        )
        self._backend = backend
        self._frame = frame

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer`."""
        by_backend = add_special_tokens and self._frame is None
        try:
            if len(text) <= _SHORT_CHARACTERS:
                ids = self._backend.encode(text, add_special_tokens=by_backend).ids
            else:
                (encoding,) = self._backend.encode_batch([text], add_special_tokens=by_backend)
                ids = encoding.ids
        except TypeError:  # the library's word for a str that has no UTF-8
            raise not_unicode(text) from None
        if add_special_tokens and self._frame is not None:
            before, after = self._frame
            return [*before, *ids, *after] if before or after else ids
        return ids

    def save(self, file: Path) -> None:
        """Writes it as a tokenizer.json."""
        self._backend.save(str(file))

    def token_text(self, token_id: int) -> str:
        """See `Tokenizer`."""
        if not 0 <= token_id < self.vocab_size:
            return ""
        return self._backend.id_to_token(token_id) or ""


def not_unicode(text: str) -> InvalidRequest:
    """The error for a text with a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        char = text[error.start]
        return InvalidRequest(
            f"the text is not Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(char):04X}; send whole characters"
        )
    return InvalidRequest("the tokenizer cannot read this text")


def _special_id(backend: tokenizers.Tokenizer, token: Any) -> int | None:
    return backend.token_to_id(token_text(token)) if token else None


def _size(backend: tokenizers.Tokenizer) -> int:
    """One more than the largest id: there may be gaps."""
    size = backend.get_vocab_size(with_added_tokens=True)
    return max([size, *(token_id + 1 for token_id in backend.get_added_tokens_decoder())])


def _decoders(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    return {decoder["type"] for decoder in _decoders(backend)}


def _strips_first_space(backend: tokenizers.Tokenizer) -> bool:
    for decoder in _decoders(backend):
        if decoder["type"] == "Strip" and decoder["content"] == " " and decoder["start"]:
            return True
        if decoder["type"] == "Metaspace" and decoder.get("prepend_scheme", "always") != "never":
            return True
    return False

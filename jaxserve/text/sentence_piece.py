"""Tokenizers that the `sentencepiece` library runs: a .model file, or one written for a GGUF file.

SentencePiece itself never finds control tokens in a text; they are cut out here before. Where a
model puts a space before its text (the dummy prefix), Hugging Face's older ("legacy") behaviour
puts one after each control token too, the newer one only at the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from jaxserve.errors import WeightsError
from jaxserve.formats.sentence_piece import with_dummy_prefix
from jaxserve.text.fast import not_unicode, stop_ids
from jaxserve.text.pieces import PieceTokenizer, spell_sentence_piece
from jaxserve.text.template_files import read_json, token_text


def load_model(file: Path) -> SentencePieceTokenizer:
    """A .model file, with the configuration and added tokens beside it.

    Raises:
        WeightsError: a file is broken.
    """
    try:
        model = file.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read the tokenizer {file}: {error}") from error
    config = read_json(file.parent / "tokenizer_config.json")
    added, special_ids = _added_tokens(file.parent)
    processor = open_processor(model, str(file))
    ids = {**_control_ids(processor), **added}
    bos = ids.get(token_text(config["bos_token"])) if config.get("bos_token") else None
    eos = ids.get(token_text(config["eos_token"])) if config.get("eos_token") else None
    bos = processor.bos_id() if bos is None else bos
    eos = processor.eos_id() if eos is None else eos
    return SentencePieceTokenizer(
        model,
        name=str(file),
        added=added,
        special_ids=special_ids,
        before=[bos] if config.get("add_bos_token", True) and bos >= 0 else [],
        after=[eos] if config.get("add_eos_token", False) and eos >= 0 else [],
        legacy=bool(config.get("legacy", True)),
        eos_token_ids=stop_ids(file.parent, eos if eos >= 0 else None),
    )


class SentencePieceTokenizer(PieceTokenizer):
    """A `Tokenizer` over the `sentencepiece` library.

    Args:
        model: bytes of the .model file; name: where it came from, for messages.
        added: tokens beyond the model, by text; those in special_ids are control tokens.
        before, after: ids put around a text.
        legacy: a dummy prefix goes after each control token too.
        texts: the pieces' texts by id, where the model's own are not those of the vocabulary.

    Raises:
        WeightsError: the model is broken.

    Attributes:
        model: as given.
    """

    def __init__(
        self,
        model: bytes,
        *,
        name: str,
        added: Mapping[str, int],
        special_ids: Sequence[int],
        before: Sequence[int],
        after: Sequence[int],
        legacy: bool,
        eos_token_ids: Sequence[int],
        texts: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        processor = open_processor(model, name)
        has_prefix = processor.Normalize("a") != "a"
        found = {**_control_ids(processor), **added}
        size = processor.get_piece_size()
        self._texts = (
            list(texts) if texts is not None else list(map(processor.id_to_piece, range(size)))
        )
        self._texts += [""] * (max([size, *(i + 1 for i in added.values())]) - len(self._texts))
        for text, token_id in added.items():
            self._texts[token_id] = text
        written = set(found.values())

        def spell(token_id: int, piece: str) -> bytes:
            if token_id in written:
                return piece.encode("utf-8", "replace")
            return spell_sentence_piece(piece)

        super().__init__(
            vocab_size=len(self._texts),
            spell=spell,
            special_ids=[*_control_ids(processor).values(), *special_ids, processor.unk_id()],
            eos_token_ids=eos_token_ids,
            strips_first_space=has_prefix,
        )
        self._first = processor
        self._later = processor
        if has_prefix and not legacy:
            self._later = open_processor(with_dummy_prefix(model, False), name)
        self._before = list(before)
        self._after = list(after)
        self._found = found
        texts_found = sorted(filter(None, found), key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, texts_found)) + ")")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See `Tokenizer`."""
        ids = list(self._before) if add_special_tokens else []
        processor = self._first
        for index, part in enumerate(self._cut.split(text) if self._found else [text]):
            if index % 2:  # re.split puts the separators at odd places
                ids.append(self._found[part])
            elif part:
                try:
                    ids += processor.encode(part.encode())
                except UnicodeEncodeError:
                    raise not_unicode(text) from None
            processor = self._later
        return ids + self._after if add_special_tokens else ids

    def token_text(self, token_id: int) -> str:
        """See `Tokenizer`."""
        return self._texts[token_id] if 0 <= token_id < self.vocab_size else ""


def open_processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """The library's reader of a model's bytes.

    Raises:
        WeightsError: it cannot read them.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"cannot read the tokenizer {name}: {error}") from error
    return processor


def _control_ids(processor: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    ids = range(processor.get_piece_size())
    return {processor.id_to_piece(i): i for i in ids if processor.is_control(i)}


def _added_tokens(directory: Path) -> tuple[dict[str, int], list[int]]:
    """Tokens that Hugging Face's files add: ids by text, and which of them are control tokens."""
    added = {text: int(i) for text, i in read_json(directory / "added_tokens.json").items()}
    special_ids: list[int] = []
    decoder = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
    for key, token in decoder.items():
        added[token_text(token)] = int(key)
        if token.get("special"):
            special_ids.append(int(key))
    return added, special_ids

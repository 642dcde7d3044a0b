"""Texts as an encoder wants them: special tokens, pairs, cut to length, prompts in front.

Works on the encoder's own tokenizer.json, or with the generating model's tokenizer where that model
embeds as well. Nothing is decoded here, so any kind of vocabulary will do.

Invariants: no JAX. Methods may be called from several threads. What comes out is never longer than
asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import tokenizers
from tokenizers import normalizers
from tokenizers.normalizers import Lowercase

from jaxserve.config import EmbeddingsConfig
from jaxserve.errors import InvalidRequest, WeightsError
from jaxserve.formats.sentence_files import SentenceFiles, read_sentence_files
from jaxserve.text.fast import not_unicode
from jaxserve.text.tokenizer import Tokenizer

#: Names of prompts in models' files, for the two sides of a search.
_QUERY = ("query", "search_query", "web_search_query")
_DOCUMENT = ("document", "passage", "search_document", "text")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text, or a pair of texts.

    Attributes:
        second_start: of a pair, where its second text begins; None for one text.
        num_before: tokens that it had before it was cut.
    """

    ids: list[int]
    num_before: int
    second_start: int | None = None


class EmbeddingTokenizer(Protocol):
    """From text to what the model is given."""

    def encode(self, texts: Sequence[str], limit: int | None) -> list[Tokens]:
        """Texts with their special tokens, cut to `limit` tokens where it is not None.

        Raises:
            InvalidRequest: a text is not Unicode text (a lone surrogate).
        """
        ...

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], limit: int | None) -> list[Tokens]:
        """Pairs of texts; of one that is too long, the longer text is cut first."""
        ...


class EncoderTokenizer:
    """An encoder's tokenizer.json.

    Args:
        lower_case: whether texts are lowercased first, whatever the file says.
    """

    def __init__(self, file: Path, *, lower_case: bool = False) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise WeightsError(f"cannot read the tokenizer {file}: {error}") from error
        self._backend.no_padding()
        self._backend.no_truncation()
        if lower_case:
            rest = self._backend.normalizer
            steps = [Lowercase(), *([] if rest is None else [rest])]
            self._backend.normalizer = normalizers.Sequence(steps)
        self._specials = self._backend.num_special_tokens_to_add(False)
        self._pair_specials = self._backend.num_special_tokens_to_add(True)

    def encode(self, texts: Sequence[str], limit: int | None) -> list[Tokens]:
        """See `EmbeddingTokenizer`."""
        found = []
        for encoding in self._encode(texts):
            num_before = len(encoding.ids) + self._specials
            if limit is not None and num_before > limit:
                encoding.truncate(max(limit - self._specials, 0))
            ids = self._backend.post_process(encoding).ids
            found.append(Tokens(ids if limit is None else ids[:limit], num_before))
        return found

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], limit: int | None) -> list[Tokens]:
        """See `EmbeddingTokenizer`."""
        firsts = self._encode([first for first, _ in pairs])
        seconds = self._encode([second for _, second in pairs])
        found = []
        for first, second in zip(firsts, seconds, strict=True):
            num_before = len(first.ids) + len(second.ids) + self._pair_specials
            if limit is not None and num_before > limit:
                keep = _shared(len(first.ids), len(second.ids), limit - self._pair_specials)
                first.truncate(keep[0])
                second.truncate(keep[1])
            whole = self._backend.post_process(first, second)
            types = whole.type_ids
            start = types.index(1) if 1 in types else len(types)
            found.append(Tokens(whole.ids, num_before, start))
        return found

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        try:
            return self._backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:  # the library's word for a str that has no UTF-8
            for text in texts:
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise not_unicode(text) from None
            raise


class ServedTokenizer:
    """The generating model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str], limit: int | None) -> list[Tokens]:
        """See `EmbeddingTokenizer`."""
        encoded = [self._tokenizer.encode(text) for text in texts]
        return [Tokens(ids[:limit], len(ids)) for ids in encoded]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]], limit: int | None) -> list[Tokens]:
        """A decoder scores no pairs."""
        raise InvalidRequest("this model scores no pairs of texts")


class EmbeddingText:
    """The text half of the model that embeds.

    Attributes:
        tokenizer: see `EmbeddingTokenizer`.
        prompts: text to put before another, by name.
        default_prompt: name of the one that is used where none is named; "" for none.
    """

    def __init__(
        self,
        tokenizer: EmbeddingTokenizer,
        files: SentenceFiles,
        *,
        query_prefix: str = "",
        document_prefix: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.prompts = dict(files.prompts)
        self.default_prompt = files.default_prompt if files.default_prompt in self.prompts else ""
        if query_prefix:
            self.prompts.setdefault("query", query_prefix)
        if document_prefix:
            self.prompts.setdefault("document", document_prefix)

    def prefix(self, name: str | None) -> str:
        """The prompt of a name; the default one for None.

        Raises:
            InvalidRequest: there is none of that name.
        """
        if name is None:
            return self.prompts.get(self.default_prompt, "")
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InvalidRequest(
                f"prompt_name {name[:60]!r} is no prompt of this model; it has: {known}",
                param="prompt_name",
            )
        return self.prompts[name]

    def side_prefix(self, *, is_query: bool) -> str:
        """The prompt of one side of a search; the default one, if any, where there is none."""
        names = _QUERY if is_query else _DOCUMENT
        found = next((self.prompts[name] for name in names if name in self.prompts), None)
        return self.prefix(None) if found is None else found


def load_embedding_text(config: EmbeddingsConfig, served: Tokenizer) -> EmbeddingText | None:
    """The text half of what `embeddings.model` names, resolved; None where it names nothing.

    Args:
        served: of the generating model.

    Raises:
        WeightsError: there is no tokenizer.json, or a file is broken.
    """
    if not config.model:
        return None
    directory = Path(config.model)
    if config.model == "served":
        tokenizer, files = ServedTokenizer(served), SentenceFiles()
    else:
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise WeightsError(f"{directory} has no tokenizer.json, which an encoder needs")
        files = read_sentence_files(directory)
        tokenizer = EncoderTokenizer(file, lower_case=files.lower_case)
    return EmbeddingText(
        tokenizer,
        files,
        query_prefix=config.query_prefix,
        document_prefix=config.document_prefix,
    )


def groups_of(texts: Sequence[Tokens], size: int) -> deque[list[int]]:
    """Places of texts in groups of at most `size`, to be sent to the engine one after the other.

    Long ones come first: texts of similar lengths share a step, and the last step is a short one.
    """
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place].ids))
    return deque(order[start : start + size] for start in range(0, len(order), size))


def _shared(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of each text stay: the longer one gives way first, down to the other."""
    room = max(room, 0)
    if 2 * min(first, second) > room:
        return (room // 2, room - room // 2) if first <= second else (room - room // 2, room // 2)
    return (first, room - first) if first <= second else (room - second, second)

"""How byte-level BPE vocabularies in GGUF files cut text before merging, by the file's name for it.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) instead of spelling it out. The patterns
are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from dataclasses import dataclass

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from jaxserve.errors import WeightsError


@dataclass(frozen=True, kw_only=True)
class PreTokenizing:
    """What a name stands for.

    Attributes:
        pattern: text is cut into its matches; empty for GPT-2's own.
        single_digits: each digit is cut off before that.
        nfc: text is brought into Unicode's composed form first.
        whole_words: a word that is in the vocabulary is that token, without merging.
        add_bos: whether a first token is added where the file does not say.
    """

    pattern: str = ""
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False

    def apply(self, backend: tokenizers.Tokenizer) -> None:
        """Sets up the cutting of a backend."""
        steps: list[pre_tokenizers.PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern:
            steps.append(pre_tokenizers.Split(tokenizers.Regex(self.pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not self.pattern))
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
        if self.nfc:
            backend.normalizer = normalizers.NFC()


def pre_tokenizing(name: str) -> PreTokenizing:
    """What `tokenizer.ggml.pre` asks for.

    Raises:
        WeightsError: the name is not known here.
    """
    found = _BY_NAME.get(name)
    if found is None:
        raise WeightsError(
            f"the GGUF file's pre-tokenizer {name!r} is not known here ({', '.join(_BY_NAME)} are);"
            " give the model's own tokenizer.json as model.tokenizer"
        )
    return found


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

_GPT2 = PreTokenizing()
_DIGITS = PreTokenizing(single_digits=True)
_LLAMA3 = PreTokenizing(
    pattern=rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    whole_words=True,
    add_bos=True,
)
_QWEN2 = PreTokenizing(
    pattern=rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}", nfc=True
)
_TEKKEN = PreTokenizing(
    pattern=rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    add_bos=True,
)

_BY_NAME: dict[str, PreTokenizing] = {
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}

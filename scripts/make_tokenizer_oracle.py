"""Writes tests/data/tokenizer/smollm2.json: what transformers makes of texts and conversations.

Needs transformers, torch and gguf, which jaxserve itself does not:

    python scripts/make_tokenizer_oracle.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf TARGET.json

The published SmolLM2 tokenizer splits digits one by one before anything else. transformers'
conversion from GGUF loses that step, so it is put back here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tokenizers
import transformers

TEXTS: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t\tif x:\r\n\t\t\treturn y\r\n",
    "Hello",
    " Hello",
    "  Hello",
    "Hello, world!",
    "Hello   world   ",
    "The quick brown fox jumps over the lazy dog.",
    "don't can't we'll I'm you've he'd SHE'S o'clock 'tis",
    "0123456789",
    " 17 + 25 = 42; 3.14159 x10^-7",
    "room  101 and   1 more",
    "2026-11-24T01:59:00Z",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
    "<html><body class='x'>&amp;</body></html>",
    "https://example.com/path?query=1&other=%20two#frag",
    "Ünïcödé naïve café résumé",
    "cafe\u0301 decomposed, ﬁ ligature, ½ ² Ⅷ",
    "Привет, как дела?",
    "日本の首都は東京です。",
    "中文分词测试,没有空格",
    "한국어 텍스트",
    "العربية من اليمين إلى اليسار",
    "हिन्दी में लिखा हुआ",
    "🙂🚀👩‍👩‍👧‍👦🏳️‍🌈",
    "mixed🙂text with 日本 and עברית",
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "a" * 300,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "nul\x00byte, bell\x07, delete\x7f, soft\u00adhyphen, zero\u200bwidth, bom\ufeff",
    "nbsp\u00a0thin\u2009ideographic\u3000line\u2028paragraph\u2029next\u0085end",
    "!!! ??? ... --- *** ### $$$ @@@ ~~~ ``` \\\\\\",
    "<|im_start|>user\nHi<|im_end|>\n",
    " <|im_end|> in <|endoftext|>text<|im_end|>",
    "<|im_star t|> <|unknown|> <|im_end|",
    "<repo_name>x<file_sep>y<issue_start><jupyter_code>",
    "ǅ Ǆ ß ſ İ ı",
    "\U0001f1e9\U0001f1ea \U00010348 \U000e0001",
    "١٢٣ 四五六 ⅷ ①②",
)
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is gravity?"}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "  two\n\nlines <|im_end|> & <b>'quoted'</b> {{ 7 * 7 }}"},
    ],
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "日本 🙂"}],
)


def main() -> int:
    """Writes the file."""
    gguf, target = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    pre = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    cases = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        cases.append(
            {
                "text": text,
                "ids": ids,
                "tokens": tokenizer.convert_ids_to_tokens(ids),
                "decoded": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
                "decoded_plain": tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
            }
        )
    chats = [
        {
            "messages": messages,
            "add_generation_prompt": add,
            "rendered": tokenizer.apply_chat_template(
                messages, add_generation_prompt=add, tokenize=False
            ),
            "ids": tokenizer.apply_chat_template(
                messages, add_generation_prompt=add, return_dict=True
            )["input_ids"],
        }
        for messages in CONVERSATIONS
        for add in (True, False)
    ]
    document = {"vocab_size": len(tokenizer), "texts": cases, "chats": chats}
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{len(cases)} texts, {len(chats)} chats → {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

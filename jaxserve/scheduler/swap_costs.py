"""What it costs to bring a sequence back: copying its pages, or computing its tokens once more.

Both are measured while the engine runs. A prompt token's time is what steps with chunks take beyond
what their decoding rows take alone, over their chunks' tokens; a page's is what the executor tells.
Old measurements fade, so that the estimates follow the load.

Where nothing is known yet copying counts as free: the first steps of any load compute prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.scheduler.plan import Plan

#: What a step's measurement has lost of its weight when the next one comes.
FADING = 0.05


class SwapCosts:
    """Running estimates; all times in nanoseconds.

    Attributes:
        page_ns: by cache group, to save a page and to load it again.
    """

    def __init__(self) -> None:
        self.page_ns: Sequence[float] = ()
        self._prefill_ns = 0.0
        self._prefill_tokens = 0.0
        self._decode_ns = 0.0
        self._decode_calls = 0.0

    @property
    def token_ns(self) -> float | None:
        """To compute one known token; None while none has been measured."""
        if self._prefill_tokens < 1:
            return None
        return self._prefill_ns / self._prefill_tokens

    def observe(self, plan: Plan, num_rows: int, device_ns: int, page_ns: Sequence[float]) -> None:
        """Takes in what a plan's step took, and what the executor says of pages.

        A step that moved pages, or verified drafts, tells nothing about a prompt's tokens.

        Args:
            num_rows: that ran, decoding ones and chunks.
            device_ns: 0 where it was not measured.
        """
        if page_ns:
            self.page_ns = page_ns
        if not device_ns or plan.page_saves or plan.page_loads:
            return
        if any(chunk.num_drafts for chunk in plan.chunks):
            return
        decodes = num_rows > len(plan.chunks)
        if plan.chunks:
            prefill_tokens = sum(len(chunk.token_ids) for chunk in plan.chunks)
            beside = 0.0
            if decodes and self._decode_calls:
                beside = self._decode_ns / self._decode_calls
            self._prefill_ns *= 1 - FADING
            self._prefill_tokens *= 1 - FADING
            self._prefill_ns += max(device_ns - beside, 0.0)
            self._prefill_tokens += prefill_tokens
        else:
            self._decode_ns = self._decode_ns * (1 - FADING) + device_ns / plan.decode_steps
            self._decode_calls = self._decode_calls * (1 - FADING) + 1

    def swap_pays(self, num_tokens: int, num_pages: Sequence[int]) -> bool:
        """Whether pages are copied there and back in less time than their tokens are computed.

        Args:
            num_tokens: that would be computed again.
            num_pages: that hold them, of each cache group.
        """
        token_ns = self.token_ns
        if token_ns is None or not self.page_ns:
            return True
        copies = sum(pages * ns for pages, ns in zip(num_pages, self.page_ns, strict=True))
        return copies < num_tokens * token_ns

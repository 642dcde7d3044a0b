"""What a request must satisfy to be let in at all: it fits the context and the cache."""

from __future__ import annotations

from jaxserve.errors import ContextTooLong, OutOfPages
from jaxserve.scheduler.pages import PageAllocator


def check_context(prompt_len: int, max_tokens: int, max_context: int) -> None:
    """Prompt and output fit the model's context; the last token is never an input.

    Raises:
        ContextTooLong: they do not.
    """
    if prompt_len + max_tokens - 1 > max_context:
        raise ContextTooLong(
            f"the prompt has {prompt_len} tokens and max_tokens is {max_tokens}, in all "
            f"{prompt_len + max_tokens}, but the model's context is {max_context} tokens; shorten "
            "the prompt or lower max_tokens",
            param="max_tokens",
        )


def check_cache(prompt_len: int, max_tokens: int, pages: PageAllocator) -> None:
    """Prompt and output fit the cache, when nothing else runs.

    Raises:
        OutOfPages: they do not.
    """
    num_positions = prompt_len + max_tokens - 1
    if not pages.fits_alone(num_positions):
        sizes = ", ".join(str(pool.capacity) for pool in pages.pools)
        raise OutOfPages(
            f"prompt and output need {num_positions} positions, but the cache has {sizes} "
            f"pages of {pages.page_size}; shorten the prompt, lower max_tokens, or raise "
            "cache.memory_bytes",
            param="max_tokens",
        )

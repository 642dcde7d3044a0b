"""What a request must satisfy to be let in at all: it fits the context, the cache, the queue."""

from __future__ import annotations

from jaxserve.errors import ContextTooLong, InvalidRequest, OutOfPages, Overloaded
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


def check_queue(
    num_new: int, num_waiting: int, num_free_slots: int, max_waiting: int, max_rows: int
) -> None:
    """There is room in the queue, beside what the next plans can take out of it.

    Raises:
        InvalidRequest: there would be none even if nobody else were there.
        Overloaded: too many wait.
    """
    if num_new > max_waiting + max_rows:
        raise InvalidRequest(
            f"{num_new} sequences are more than may ever run and wait here, "
            f"{max_rows} + {max_waiting}: lower n, or raise scheduler.max_waiting",
            param="n",
        )
    if num_waiting + num_new > max_waiting + num_free_slots:
        raise Overloaded(
            f"{num_waiting} sequences wait and {num_new} more came, the limit is "
            f"{max_waiting}; try again later, or raise scheduler.max_waiting"
        )

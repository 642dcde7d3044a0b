"""A Python caller's values, as the types that a request needs.

NumPy's numbers and any iterable will do. What will not is an `InvalidRequest` that names the field
and the value. (`text.fields` does the same for a JSON object, whose values have fewer types.)
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from jaxserve.errors import InvalidRequest

_SHORT = reprlib.Repr(maxlevel=3, maxstring=80, maxother=80, maxlong=80)


def integers(name: str, values: Any, wanted: str = "token ids") -> list[int]:
    """A list of integers, from anything that has some."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise wrong(name, wanted, values)
    return [integer(name, value, wanted=wanted) for value in values]


def integer(name: str, value: Any, low: int | None = None, wanted: str = "an integer") -> int:
    """An integer of at most 64 bits, no less than `low`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise wrong(name, wanted, value) from None
    if found.bit_length() > 64:
        raise InvalidRequest(
            f"{name} holds an integer of {found.bit_length()} bits, 64 is the limit", param=name
        )
    if low is not None and found < low:
        raise InvalidRequest(f"{name} must be at least {low}, got {found}", param=name)
    return found


def number(name: str, value: Any) -> float:
    """A number."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong(name, "a number", value) from None


def flag(name: str, value: Any) -> bool:
    """True or false, and nothing else that Python takes for it."""
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def is_list(value: Any) -> bool:
    """Whether it is a list, tuple or set of something, not a text."""
    return isinstance(value, Sequence | Set) and not isinstance(value, str | bytes)


def wrong(name: str, wanted: str, value: Any) -> InvalidRequest:
    """The error for a value that is not what was wanted."""
    return InvalidRequest(f"{name} takes {wanted}, got {show(value)}", param=name)


def show(value: Any) -> str:
    """A caller's value for a message: recognisable and short, however large or deep it is."""
    return _SHORT.repr(value)

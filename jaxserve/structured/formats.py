"""Dates and times in schemas, held to as strictly as those who read them are.

llguidance takes a `format` for its shape: a 29th of February in any year, the year 0000, and second
60 on any minute, none of which `datetime` or a validator takes. A pattern beside the format rules
them out. (RFC 3339 has the year 0000, and second 60 where a leap second was; nobody misses those.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_MONTH = "(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"  # as far as all months go
_DAY = f"({_MONTH}|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"
_DATE = f"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5]"
#: What begins each; its format says how it goes on.
_PATTERNS = {"date": f"^{_DATE}$", "date-time": f"^{_DATE}[Tt ]{_TIME}", "time": f"^{_TIME}"}
#: Keywords whose values are data and not schemas.
_DATA = frozenset({"const", "default", "enum", "example", "examples"})
#: Keywords whose values are schemas by names of the client's.
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def with_real_dates(schema: Any) -> Any:
    """The schema with a pattern beside each such format; a copy where it has one."""
    match schema:
        case Mapping():
            found = {key: _value(key, value) for key, value in schema.items()}
            kind = schema.get("format")
            pattern = _PATTERNS.get(kind) if isinstance(kind, str) else None
            if pattern is not None:
                others = found.get("allOf", [])
                if isinstance(others, list):  # else it is refused as it stands
                    found["allOf"] = [*others, {"pattern": pattern}]
            return found
        case list():
            return [with_real_dates(part) for part in schema]
        case _:
            return schema


def _value(key: str, value: Any) -> Any:
    """What stands under a keyword."""
    if key in _DATA:
        return value
    if key in _BY_NAME and isinstance(value, Mapping):
        return {name: with_real_dates(schema) for name, schema in value.items()}
    return with_real_dates(value)

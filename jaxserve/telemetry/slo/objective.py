"""Reads objectives as they stand in the configuration.

    p99 ttft < 100 ms
    p95 e2e < 2 s tenant=acme|beta-* priority=high
    p99 tpot < 20 ms model=llama* adapter=support period=7d
    error_rate < 0.1%
    availability > 99.9%

"p99" says that 99% of the requests must be so. Whatever cannot be read is refused with the
objective and the nearest word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from jaxserve.errors import ConfigError
from jaxserve.telemetry.slo.indicator import Indicator, Kind, Scope

DEFAULT_PERIOD_S = 28 * 86400
#: A burn-rate alert looks back over three days; and counts are kept for the period.
MIN_PERIOD_S, MAX_PERIOD_S = 3 * 86400, 92 * 86400
MAX_OBJECTIVES = 64

_UNITS_NS = {"us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9}
_PERIODS_S = {"h": 3600, "d": 86400, "w": 7 * 86400}
_KINDS = tuple(kind.value for kind in Kind)
_KEYS = ("model", "tenant", "priority", "adapter", "period")
_CLASSES = ("high", "normal", "low")
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_LATENCY = re.compile(rf"p({_NUMBER})\s+(\w+)\s*(\S)\s*({_NUMBER})\s*([^\W\d]+)(?:\s+(.*))?$")
_RATE = re.compile(rf"(\w+)\s*(\S)\s*({_NUMBER})\s*%(?:\s+(.*))?$")
_FORM = (
    'an objective is like "p99 ttft < 100 ms", "error_rate < 0.1%" or "availability > 99.9%", '
    "followed by model=, tenant=, priority=, adapter= or period= where it is not for all"
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One objective.

    Attributes:
        name: as it is written, in the one form that all spellings of it have.
        target: share of the requests that must be good, between 0 and 1.
    """

    name: str
    indicator: Indicator
    target: Decimal
    period_s: int = DEFAULT_PERIOD_S

    @property
    def budget(self) -> Decimal:
        """Share of the requests that may be bad."""
        return 1 - self.target


def parse_objectives(texts: Sequence[str]) -> list[Objective]:
    """The objectives of a configuration.

    Raises:
        ConfigError: one cannot be read, stands there twice, or there are too many.
    """
    if len(texts) > MAX_OBJECTIVES:
        raise ConfigError(f"slo.objectives has {len(texts)} entries; at most {MAX_OBJECTIVES} fit")
    objectives: dict[str, Objective] = {}
    for text in texts:
        objective = parse_objective(text)
        if objective.name in objectives:
            raise ConfigError(f"slo.objectives has {objective.name!r} twice; leave one out")
        objectives[objective.name] = objective
    return list(objectives.values())


def parse_objective(text: str) -> Objective:
    """One objective.

    Raises:
        ConfigError: it cannot be read.
    """
    plain = " ".join(text.split())
    latency, rate = _LATENCY.match(plain), _RATE.match(plain)
    if latency is not None:
        percent, word, sign, number, unit, rest = latency.groups()
        kind = _kind(text, word)
        if not kind.is_latency:
            raise _wrong(text, f'{kind} has no percentile; write "{_example(kind)}"')
        return _objective(text, kind, f"p{percent}", percent, sign, (number, unit), rest)
    if rate is not None:
        word, sign, percent, rest = rate.groups()
        kind = _kind(text, word)
        if kind.is_latency:
            raise _wrong(text, f'{kind} needs a percentile and a time; write "{_example(kind)}"')
        return _objective(text, kind, "", percent, sign, None, rest)
    raise _wrong(text, _reason(plain))


def _objective(
    text: str,
    kind: Kind,
    share: str,
    percent: str,
    sign: str,
    time: tuple[str, str] | None,
    rest: str | None,
) -> Objective:
    wanted = ">" if kind is Kind.AVAILABILITY else "<"
    if sign != wanted:
        raise _wrong(text, f'{kind} takes "{wanted}", not "{sign}"')
    target = Decimal(percent) / 100
    if kind is Kind.ERROR_RATE:
        target = 1 - target
    if not 0 < target < 1:
        raise _wrong(text, f"{percent}% leaves no room: take a share above 0% and below 100%")
    scope, period_s = _rest(text, rest or "")
    threshold_ns = _threshold_ns(text, *time) if time is not None else 0
    indicator = Indicator(
        kind=kind, threshold_ns=threshold_ns, threshold=_written(threshold_ns), scope=scope
    )
    limit = indicator.threshold or f"{_plain(percent)}%"
    words = [share and f"p{_plain(percent)}", f"{kind} {sign} {limit}", scope.text]
    if period_s != DEFAULT_PERIOD_S:
        words.append(f"period={_period(period_s)}")
    return Objective(
        name=" ".join(filter(None, words)), indicator=indicator, target=target, period_s=period_s
    )


def _kind(text: str, word: str) -> Kind:
    if word not in _KINDS:
        raise _unknown(text, word, _KINDS)
    return Kind(word)


def _threshold_ns(text: str, number: str, unit: str) -> int:
    if unit not in _UNITS_NS:
        raise _unknown(text, unit, list(_UNITS_NS))
    threshold_ns = int(Decimal(number) * _UNITS_NS[unit])
    if threshold_ns <= 0:
        raise _wrong(text, "no request takes no time; take a threshold above 0")
    return threshold_ns


def _rest(text: str, rest: str) -> tuple[Scope, int]:
    """Scope and period from what follows the limit."""
    values: dict[str, str] = {}
    for word in rest.split():
        key, equals, value = word.partition("=")
        if key not in _KEYS:
            raise _unknown(text, key, _KEYS)
        if not (equals and value):
            raise _wrong(text, f"{key} needs a value, as in {key}=…")
        if key in values:
            raise _wrong(text, f"{key} stands there twice; separate several by |")
        values[key] = value
    priority = values.get("priority", "")
    if priority and priority not in _CLASSES and not re.fullmatch(r"-?\d+", priority):
        raise _unknown(text, priority, _CLASSES)
    period = values.get("period")
    model, tenant, adapter = (
        tuple(sorted({glob for glob in re.split(r"[|,]", values.get(key, "")) if glob}))
        for key in ("model", "tenant", "adapter")
    )
    scope = Scope(model=model, tenant=tenant, priority=priority, adapter=adapter)
    return scope, DEFAULT_PERIOD_S if period is None else _period_s(text, period)


def _period_s(text: str, period: str) -> int:
    match = re.fullmatch(r"(\d+)([a-z]+)", period)
    if match is None or match[2] not in _PERIODS_S:
        raise _wrong(text, f"period={period} is not like 28d, 4w or 96h")
    period_s = int(match[1]) * _PERIODS_S[match[2]]
    if not MIN_PERIOD_S <= period_s <= MAX_PERIOD_S:
        raise _wrong(text, f"period={period} must be between 3d and 92d")
    return period_s


def _reason(plain: str) -> str:
    """Why neither form fits, as well as can be said."""
    words = plain.split()
    head = words[1] if len(words) > 1 and re.fullmatch(r"p[\d.]+", words[0]) else (words or [""])[0]
    head = re.split(r"[<>=]", head)[0]
    if head and head not in _KINDS:
        return f"{_nearest(head, _KINDS)}; {_FORM}"
    return _FORM


def _unknown(text: str, word: str, known: Sequence[str]) -> ConfigError:
    return _wrong(text, _nearest(word, known))


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)
    return f"{word!r} is not known, the nearest is {near[0]!r}"


def _wrong(text: str, reason: str) -> ConfigError:
    return ConfigError(f"slo.objectives: cannot read {text!r}: {reason}")


def _example(kind: Kind) -> str:
    match kind:
        case Kind.AVAILABILITY:
            return "availability > 99.9%"
        case Kind.ERROR_RATE:
            return "error_rate < 0.1%"
    return f"p99 {kind} < 100 ms"


def _written(threshold_ns: int) -> str:
    """A time in the largest unit that leaves no fraction, or in ms below a second."""
    if not threshold_ns:
        return ""
    if threshold_ns % 10**9 == 0:
        return f"{threshold_ns // 10**9} s"
    unit = "ms" if threshold_ns >= 10**6 else "us"
    return f"{_plain(Decimal(threshold_ns) / _UNITS_NS[unit])} {unit}"


def _plain(number: str | Decimal) -> str:
    """A number without needless zeros: "99.90" is "99.9", "100" stays."""
    text = f"{Decimal(number):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _period(period_s: int) -> str:
    return f"{period_s // 86400}d" if period_s % 86400 == 0 else f"{period_s // 3600}h"

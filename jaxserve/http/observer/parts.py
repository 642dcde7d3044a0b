"""Which parts the observer has, by the configuration: the one place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxserve.config import Config
from jaxserve.http.keyfile import load_keys
from jaxserve.http.observer.metering import Metering, NoLedger
from jaxserve.http.observer.part import Part
from jaxserve.metering.power.power import check_power
from jaxserve.metering.prices import make_prices

#: Has all workers know something: a topic, and its JSON.
Tell = Callable[[str, bytes], None]


def make_parts(config: Config, state: Path, tell: Tell) -> list[Part]:
    """The parts.

    Args:
        state: directory of what outlives this process.
        tell: `Observer.tell`.

    Raises:
        ConfigError: a setting of a part cannot be used.
    """
    parts = []
    if config.metering.enabled:
        budgets = load_keys(config.http).budgets
        parts.append(Metering(config.metering, NoLedger(), tell, state, budgets=budgets).part)
    return parts


def check_parts(config: Config) -> None:
    """Looks at the settings of all parts before anything is started.

    Raises:
        ConfigError: one cannot be used.
    """
    make_prices(config.metering)
    check_power(config.metering)

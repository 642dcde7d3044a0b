"""`jaxserve slo rules`: Prometheus rules of the configured objectives."""

from __future__ import annotations

import sys

from jaxserve.config import Config
from jaxserve.errors import ConfigError
from jaxserve.telemetry.slo.rules import make_rules


def print_rules(config: Config) -> int:
    """Writes the rules to stdout; returns the exit status.

    Raises:
        ConfigError: there is no objective, or one cannot be read.
    """
    if not config.slo.objectives:
        raise ConfigError(
            "slo.objectives is empty: there are no rules to make; give the server's configuration "
            "with --config"
        )
    sys.stdout.write(make_rules(config.slo))
    return 0

"""What the machine's time and energy cost, as configured."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from jaxserve.config import MeteringConfig
from jaxserve.errors import ConfigError

NS_PER_HOUR = 3600 * 10**9
J_PER_KWH = Decimal(3_600_000)
#: Amounts are kept to this: a nanosecond of a machine for ten dollars an hour is three of it.
SMALLEST = Decimal("1e-12")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """In the configured currency.

    Attributes:
        hardware_per_ns: of the whole machine that this server has, busy or not.
        energy_per_j: of what its devices take, all that the building takes for it included (PUE).
        carbon_g_per_j: likewise, of CO2.
    """

    currency: str
    hardware_per_ns: Decimal
    energy_per_j: Decimal
    carbon_g_per_j: float

    def hardware(self, duration_ns: int) -> Decimal:
        """What the machine costs for so long."""
        return (self.hardware_per_ns * duration_ns).quantize(SMALLEST)

    def energy(self, energy_j: float) -> Decimal:
        """What so much energy costs."""
        return (self.energy_per_j * Decimal(energy_j)).quantize(SMALLEST)


def make_prices(config: MeteringConfig) -> Prices:
    """The configured prices.

    Raises:
        ConfigError: the currency is not three letters.
    """
    if len(config.currency) != 3 or not config.currency.isalpha():
        raise ConfigError(
            f"metering.currency must be three letters, as USD, got {config.currency!r}"
        )
    pue = Decimal(str(config.pue))
    return Prices(
        currency=config.currency.upper(),
        hardware_per_ns=Decimal(str(config.hardware_per_hour)) / NS_PER_HOUR,
        energy_per_j=Decimal(str(config.energy_per_kwh)) * pue / J_PER_KWH,
        carbon_g_per_j=config.carbon_g_per_kwh * config.pue / float(J_PER_KWH),
    )

"""What a run costs at given prices: of its workers' hours, its requests, and the bytes it moves.

Prices are of any currency; a cost is in the same one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megaseg_dask.errors import SettingsError
from megaseg_dask.events import Usage


@dataclass(frozen=True, slots=True)
class _Priced:
    """Something that has a price: its unit, what it is, and how much of it a run takes."""

    unit: str
    text: str
    amount: Callable[[Usage], float | None]


def _hours(usage: Usage) -> float | None:
    return None if usage.worker_s is None else usage.worker_s / 3600


_PRICED: Mapping[str, _Priced] = {
    "gpu": _Priced("h", "a worker with a GPU", _hours),
    "cpu": _Priced("h", "a worker without a GPU", _hours),
    "put": _Priced("req", "writing an object", lambda usage: usage.n_put),
    "get": _Priced("req", "reading an object, or a part of it", lambda usage: usage.n_get),
    "list": _Priced("req", "listing objects", lambda usage: usage.n_list),
    "delete": _Priced("req", "removing objects", lambda usage: usage.n_delete),
    "read": _Priced("GB", "bytes that leave the store", lambda usage: usage.bytes_read / 1e9),
    "write": _Priced("GB", "bytes that go into it", lambda usage: usage.bytes_written / 1e9),
    "storage": _Priced(
        "GB-month",
        "keeping the result for a month",
        lambda usage: None if usage.bytes_kept is None else usage.bytes_kept / 1e9,
    ),
}
# Paid for as long as the result is kept, and no part of what the run costs.
_MONTHLY = "storage"
NAMES = ", ".join(f"{name} (/{priced.unit}: {priced.text})" for name, priced in _PRICED.items())


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run costs; of items without a known amount the cost is ``None``.

    ``of_items`` has the items with a price, and workers of a kind that has none while the other
    kind has one, at ``None``. ``total`` leaves out what is paid by the month.
    """

    total: float
    monthly: float | None
    of_items: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a cloud, by the names of :data:`NAMES`."""

    of_unit: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> "Prices":
        """Return prices such as ``gpu=3.2/h,put=5e-6/req``; a unit may be left out.

        Raises:
            SettingsError: A name, a number or a unit is wrong.
        """
        prices: dict[str, float] = {}
        for part in filter(None, map(str.strip, text.split(","))):
            name, is_named, value = (word.strip() for word in part.partition("="))
            if not is_named and _is_number(name.partition("/")[0]):
                raise SettingsError(
                    f"--price {text}: {part} has no name; numbers have a point, such as cpu=0.1/h"
                )
            if name not in _PRICED:
                raise SettingsError(f"--price {part}: no such price; choose from {NAMES}")
            if name in prices:
                raise SettingsError(f"--price {part}: {name} has a price already; give one")
            number, has_unit, unit = (word.strip() for word in value.partition("/"))
            expected = _PRICED[name].unit
            if has_unit and unit != expected:
                raise SettingsError(f"--price {part}: the unit of {name} is /{expected}")
            prices[name] = _parse_price(part, number, expected)
        if not prices:
            raise SettingsError(f"--price {text!r}: no price; give some of {NAMES}")
        return cls(prices)

    @property
    def pays_for_keeping(self) -> bool:
        """Whether it has to be known how large the result is."""
        return _MONTHLY in self.of_unit

    def cost_of(self, usage: Usage) -> Cost:
        """Return what a run costs that takes this."""
        of_items: dict[str, float | None] = {}
        # Of workers, only the price of those that the run has.
        own, other = ("cpu", "gpu") if usage.device == "cpu" else ("gpu", "cpu")
        for name, price in self.of_unit.items():
            if name == other:
                continue
            amount = _PRICED[name].amount(usage)
            of_items[name] = None if amount is None else amount * price
        if other in self.of_unit and own not in self.of_unit:
            of_items[own] = None
        paid_once = [cost for name, cost in of_items.items() if name != _MONTHLY and cost]
        return Cost(math.fsum(paid_once), of_items.get(_MONTHLY), of_items)


def _parse_price(part: str, number: str, unit: str) -> float:
    price = float(number) if _is_number(number) else math.nan
    if not 0 <= price < math.inf:
        raise SettingsError(
            f"--price {part}: expected a number, such as 0.5/{unit}, not below 0 and without a "
            "currency"
        )
    return price


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""The option ``--price``, and what a run costs at these prices."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from megaseg_dask.events import Usage
from megaseg_dask.messages import size_text

if TYPE_CHECKING:
    from megaseg_dask.plan.prices import Prices

# The price of what is paid for as long as the result is kept.
MONTHLY = "storage"

Price = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=PRICE,…",
        help="Show the cost of the run, at prices such as gpu=3.2/h,put=5e-6/req. Names: gpu and "
        "cpu (/h, of a worker with and without a GPU); put, get, list, delete (/req, of a store); "
        "read, write (/GB, from and to a store); storage (/GB-month, of the result).",
        show_default=False,
    ),
]


def prices_of(text: str | None) -> "Prices | None":
    """Return the prices of a command line.

    Raises:
        SettingsError: A name, a number or a unit is wrong.
    """
    if text is None:
        return None
    from megaseg_dask.plan.prices import Prices

    return Prices.parse(text)


def cost_rows(usage: Usage, prices: "Prices | None") -> dict[str, str]:
    """Return the rows about what a run takes: requests, and with prices its cost."""
    rows = {"requests": requests_text(usage)}
    if prices is not None:
        rows["cost"] = cost_text(usage, prices)
    return rows


def cost_of(usage: Usage, prices: "Prices | None") -> dict[str, object] | None:
    """Return what a run costs, as JSON values; ``None`` without prices."""
    return None if prices is None else asdict(prices.cost_of(usage))


def requests_text(usage: Usage) -> str:
    """Return the requests and the stored bytes of a run in words."""
    kinds = {
        "PUT": usage.n_put,
        "GET": usage.n_get,
        "LIST": usage.n_list,
        "DELETE": usage.n_delete,
    }
    words = ", ".join(f"{n:,} {kind}" for kind, n in kinds.items())
    moved = f"{size_text(usage.bytes_read)} read, {size_text(usage.bytes_written)} written"
    kept = "" if usage.bytes_kept is None else f", {size_text(usage.bytes_kept)} kept"
    return f"{words}; {moved}{kept}, as stored"


def cost_text(usage: Usage, prices: "Prices") -> str:
    """Return what a run costs in words."""
    cost = prices.cost_of(usage)
    paid_once = [value for name, value in cost.of_items.items() if name != MONTHLY]
    items = [
        f"{name} {_amount(value)}" if name in prices.of_unit else f"{name}: no price given"
        for name, value in cost.of_items.items()
        if name != MONTHLY
    ]
    least = "at least " if None in paid_once else ""
    text = f"{least}{_amount(cost.total)}  ({', '.join(items)})" if items else ""
    if MONTHLY in cost.of_items:
        text += f"{'; ' if items else ''}{_amount(cost.monthly)} a month to keep the result"
    return text


def _amount(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"

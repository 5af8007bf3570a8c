"""Prices as they are typed, and what a run costs at them."""

import pytest

from megaseg_dask.cli.prices import cost_text, requests_text
from megaseg_dask.errors import SettingsError
from megaseg_dask.events import Usage
from megaseg_dask.plan.prices import Prices

USAGE = Usage(
    worker_s=7200.0,
    device="cuda",
    n_put=1000,
    n_get=5000,
    n_list=10,
    n_delete=3,
    bytes_read=4 * 10**9,
    bytes_written=10**9,
    bytes_kept=2 * 10**9,
)


def test_a_cost_is_the_sum_of_what_is_paid_once():
    prices = Prices.parse("gpu=3.5/h, cpu=9, put=5e-6/req,get=4e-7,read=0.09/GB,storage=0.023")
    cost = prices.cost_of(USAGE)
    # A worker with a GPU is not paid for twice.
    assert set(cost.of_items) == {"gpu", "put", "get", "read", "storage"}
    assert cost.total == pytest.approx(2 * 3.5 + 1000 * 5e-6 + 5000 * 4e-7 + 4 * 0.09)
    assert cost.monthly == pytest.approx(2 * 0.023)
    assert cost_text(USAGE, prices).startswith("7.367  (gpu 7, put 0.005,")
    assert cost_text(USAGE, prices).endswith("0.046 a month to keep the result")
    assert "1,000 PUT, 5,000 GET" in requests_text(USAGE)


def test_what_is_not_known_has_no_cost():
    unknown = Usage(None, "cpu", 1, 1, 1, 1, 1, 1)
    cost = Prices.parse("cpu=1,storage=1,list=2").cost_of(unknown)
    assert cost.of_items == {"cpu": None, "storage": None, "list": 2}
    assert cost.total == 2
    assert cost.monthly is None


def test_workers_without_a_price_are_named():
    """A laptop plans for its processor; a price of GPUs says nothing about it."""
    on_laptop = Usage(3600.0, "cpu", 1, 1, 1, 1, 1, 1)
    prices = Prices.parse("gpu=3.2/h,put=2")
    assert prices.cost_of(on_laptop).of_items == {"put": 2, "cpu": None}
    assert cost_text(on_laptop, prices) == "at least 2  (put 2, cpu: no price given)"
    assert "no price" not in cost_text(on_laptop, Prices.parse("put=2"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gold=1", r"gold=1: no such price; choose from gpu \(/h: "),
        ("gpu=1/min", "the unit of gpu is /h"),
        ("gpu=cheap", "expected a number, such as 0.5/h"),
        ("gpu=-1", "expected a number, such as 0.5/h, not below 0"),
        ("put=1,cpu=0,1/h", r"1/h has no name; numbers have a point, such as cpu=0.1/h"),
        ("gpu=nan", "expected a number"),
        ("put", "expected a number"),
        ("put=1,put=2", "has a price already"),
        (" , ", "no price"),
    ],
)
def test_other_prices_are_refused_by_name(text, message):
    with pytest.raises(SettingsError, match=message):
        Prices.parse(text)

"""The measurements run; what they measure is kept in benchmarks/results, and never asserted."""

import pytest


@pytest.mark.slow
def test_the_field_benchmark_runs():
    from benchmarks.field import measure

    found = measure((24, 80, 96))
    assert found["largest_difference"] <= 1e-5
    assert found["ours_s"] > 0

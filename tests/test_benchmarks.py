"""The measurements run; what they measure is kept in benchmarks/results, and never asserted."""

import pytest

pytestmark = pytest.mark.slow


def test_the_field_benchmark_runs():
    from benchmarks.field import measure

    found = measure((24, 80, 96))
    assert found["ours"]["torch"]["largest_difference"] <= 1e-5
    assert found["ours"]["openvino"]["dice_with_monai"] >= 0.999


def test_the_benchmark_against_a_script_runs():
    pytest.importorskip("dask_image")
    from benchmarks.script import measure

    found = measure((24, 200, 220))
    assert found["objects_ours"] == found["objects_unsplit"]


def test_the_table_of_a_gpu_runs_on_a_cpu():
    from benchmarks.gpu import TINY, measure

    found = measure(TINY)
    assert len(found["cases"]) == 4
    for case in found["cases"].values():
        assert case["dice_with_fp32"] >= 0.99
        assert len(case["top_kernels"]) == 10
        assert min(case["steady_s"], case["fraction_of_peak"]) > 0
    assert found["zarr_to_zarr"]["fields_per_s"] > 0

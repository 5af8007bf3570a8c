"""The measurements run; what they measure is kept in benchmarks/results, and never asserted."""

from itertools import pairwise

import pytest

pytestmark = pytest.mark.slow


def test_the_field_benchmark_runs():
    from benchmarks.field import measure

    found = measure((24, 80, 96), cases=("torch", "openvino"))
    assert found["ours"]["torch"]["largest_difference"] <= 1e-5
    assert found["ours"]["openvino"]["dice_with_monai"] >= 0.999


# The script calls ome-zarr as its documentation does.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
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
    assert min(job["fields_per_s"] for job in found["zarr_to_zarr"].values()) > 0


def test_the_benchmark_of_zarr_runs():
    from benchmarks.io import measure

    found = measure((40, 160, 160), repeats=1)
    assert set(found["codecs"]) == {"image", "scores", "labels"}
    assert all(
        case["times_smaller"] > 1
        for name, case in found["codecs"]["labels"].items()
        if name != "none"
    )


def test_the_timeline_shows_one_inference_at_a_time():
    from benchmarks.timeline import measure

    found = measure((24, 100, 120), n_fields=6, paces=(0.1,))
    spans = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in found["trace"] if e["name"] == "inference"
    )
    assert len(spans) == 6
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert found["worker"]["0.1 s, 3 in hand"]["fields_per_s"] > 0

"""The measurements run; what they measure is kept in benchmarks/results, and never asserted."""

import json
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


@pytest.mark.timeout(1800)
def test_the_acceptance_run_of_a_gpu_runs_on_a_cpu(tmp_path, monkeypatch):
    from benchmarks import gpu
    from benchmarks.gpu import JOBS, STEPS, TINY, Acceptance

    # A busy machine leaves out no step.
    monkeypatch.setattr(gpu, "_ASK_S", 600.0)
    Acceptance(tmp_path, TINY, seconds=1700).run()
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "failed" in line]
    found = {name: [line for line in lines if line["step"] == name] for name in STEPS}
    for name, of_step in found.items():
        assert "took_s" in of_step[-1], name
    assert all(line["ms_a_patch"] > 0 for line in found["forward"][:-1])
    for line in found["fields"][:-1]:
        assert line["dice"] >= 0.98
        assert line["same_bits_again"]
    assert found["bits"][0]["voxels_that_blocks_change"] == 0
    assert found["bits"][0]["same_in_threads"] == [True] * 3
    jobs = {line["kind"]: line for line in found["jobs"][:-1]}
    assert jobs.keys() == JOBS.keys()
    for kind, job in jobs.items():
        assert job["status"] == "done", kind
        assert len(job["gaps_s"]) == TINY.n_fields - 1
        # The fields of two workers may end at one moment: then there is no rate.
        if kind != "shared":
            assert job["fields_per_s"] > 0
    assert all(line["ms_a_patch"] > 0 for line in found["choices"][:-1])
    assert all(line["launches"] > 50 for line in found["kernels"][:-1])
    assert "no such limit" in found["out of memory"][0]["skipped"]


def test_steps_that_do_not_fit_the_time_are_skipped_and_others_go_on(tmp_path, monkeypatch):
    from benchmarks import gpu

    def fails(run):
        raise ZeroDivisionError("a bug")

    steps = {"fails": (fails, 0.0), "long": (fails, 100.0), "last": (lambda run: None, 0.0)}
    monkeypatch.setattr(gpu, "STEPS", steps)
    gpu.Acceptance(tmp_path, gpu.TINY, seconds=50).run()
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    told = [(line["step"], line.get("failed") or line.get("skipped")) for line in lines]
    assert ("fails", "ZeroDivisionError: a bug") in told
    assert ("long", "no time is left") in told
    assert told[-1] == ("last", None)


def test_the_benchmark_of_a_training_step_runs():
    from benchmarks.training_step import measure

    cases = measure(n_steps=3)["cases"]
    assert all(case["median_s"] > 0 for case in cases.values())
    assert cases["bfloat16"]["loss"] == pytest.approx(cases["float32"]["loss"], abs=0.01)


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

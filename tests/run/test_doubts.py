"""Words of doubt: each case has its line, a sound result has none, and blocks change nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megaseg_dask.algorithms.doubts import ObjectSizes
from megaseg_dask.events import Doubt
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.doubts import Facts, find_doubts
from megaseg_dask.run.state import ChannelStatistics, OutputState
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SOUND = Facts(
    name="t=0 c=0",
    n_voxels=100_000,
    channel=ChannelStatistics(mean=100.0, std=50.0, minimum=3.0, maximum=900.0),
    is_measured=True,
    output=OutputState(
        n_objects=50,
        sizes=ObjectSizes(
            foreground=20_000,
            largest=900,
            n_specks=4,
            in_specks=100,
            n_near=3,
            others=19_000,
            typical=400,
        ),
        threshold=-0.3,
        bimodality=0.95,
        n_above=20_000,
        sum_above=20_000 * 190.0,
    ),
    min_size=100,
    is_split=False,
)


def test_voxels_of_unknown_size_are_not_advised_to_be_split():
    large = changed(sizes=replace(SOUND.output.sizes, largest=15_000, others=4_900))
    [doubt] = find_doubts([large])
    assert (doubt.about, doubt.option) == ("one object", "--split distance")
    [doubt] = find_doubts([replace(large, has_size=False)])
    assert (doubt.about, doubt.option) == ("one object", "")
    assert "--split" not in doubt.advice


def changed(**output) -> Facts:
    return replace(SOUND, output=replace(SOUND.output, **output))


CASES = {
    "constant": (
        replace(SOUND, channel=ChannelStatistics(7.0, 0.0, 7.0, 7.0)),
        "all voxels have one value",
        "--channel",
    ),
    "one object": (
        changed(sizes=replace(SOUND.output.sizes, largest=15_000, others=4_900)),
        "one object holds 75% of the foreground, and is 38 times as large as most others",
        "--split distance",
    ),
    "specks": (
        changed(n_objects=1000, sizes=replace(SOUND.output.sizes, n_specks=900, in_specks=900)),
        "900 of 1000 objects have fewer than 64 voxels, and hold 4.5% of the foreground",
        "--min-size",
    ),
    "small objects": (
        changed(sizes=replace(SOUND.output.sizes, n_near=40)),
        "40 of 50 objects have less than twice the least size, 100 voxels",
        "--min-size",
    ),
    "threshold": (changed(threshold=-6.0), "a score of 0.0025", "--threshold 0.5"),
    "no classes": (changed(bimodality=0.8), "do not form two classes", "--threshold 0.5"),
    "foreground": (
        changed(sizes=replace(SOUND.output.sizes, foreground=70_000)),
        "70% of all voxels are foreground",
        "--threshold",
    ),
    "noise": (changed(sum_above=20_000 * 110.0), "0.25 standard deviations", "--channel"),
}


def test_a_sound_result_has_no_doubt():
    assert find_doubts([SOUND]) == []
    assert find_doubts([replace(SOUND, channel=None, output=OutputState())]) == []


@pytest.mark.parametrize("about", CASES)
def test_each_case_has_its_line(about):
    facts, text, advice = CASES[about]
    [doubt] = find_doubts([facts])
    assert doubt.about == about
    assert text in doubt.text
    assert advice in doubt.advice
    assert not doubt.option or doubt.option.split()[0] in doubt.advice


@pytest.mark.parametrize(
    "sizes",
    [
        # A network: beside it there is next to nothing.
        {"largest": 19_000, "others": 900, "typical": 100},
        # A few objects of about one size.
        {"largest": 11_000, "others": 9_000, "typical": 9_000},
        # Puncta are small themselves.
        {"n_specks": 50, "in_specks": 18_000, "largest": 60, "others": 0, "typical": 0},
        # A few specks.
        {"n_specks": 19, "in_specks": 200},
    ],
)
def test_structures_that_are_one_or_small_have_no_doubt(sizes):
    n_objects = max(sizes.get("n_specks", 0), 30)
    facts = changed(n_objects=n_objects, sizes=replace(SOUND.output.sizes, **sizes))
    assert find_doubts([facts]) == []


def test_statistics_of_other_voxels_tell_nothing_of_noise():
    facts, _, _ = CASES["noise"]
    assert find_doubts([replace(facts, is_measured=False)]) == []


def test_what_holds_for_many_volumes_is_told_once():
    volumes = [replace(changed(threshold=-6.0), name=f"A/{n}/0 t=0 c=0") for n in range(30)]
    [doubt] = find_doubts([SOUND, *volumes])
    assert doubt.text.startswith("A/0/0 t=0 c=0: the threshold")
    assert doubt.text.endswith("(and 29 more of such volumes)")
    assert doubt.n_volumes == 30
    assert doubt.volumes == [f"A/{n}/0 t=0 c=0" for n in range(10)]


def test_a_volume_far_from_the_others():
    volumes = [replace(changed(n_objects=50 + n), name=f"A/{n}/0") for n in range(10)]
    assert find_doubts(volumes) == []
    volumes[4] = replace(changed(n_objects=10), name="A/4/0")
    volumes[7] = replace(
        changed(sizes=replace(SOUND.output.sizes, foreground=40_000)), name="A/7/0"
    )
    [doubt] = find_doubts(volumes)
    assert doubt.volumes == ["A/4/0", "A/7/0"]
    assert doubt.text == (
        "A/4/0: 6 objects of 64 voxels or more, far fewer than elsewhere "
        "(and 1 more of such volumes)"
    )


# -- of runs


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    def call(image, name="out", **options):
        source = write_image(tmp_path / f"{name}-image.zarr", image)
        settings = {"model": str(tiny_bundle), "threads": 1, "overlap": 0, **options}
        events = []
        target = str(tmp_path / f"{name}.zarr")
        result = segment_here(str(source), target, parse_settings(settings), emit=events.append)
        assert result.status == "done"
        assert [event for event in events if isinstance(event, Doubt)] == result.doubts
        return result

    return call


def noise(shape=(24, 50, 70)):
    return np.random.default_rng(0).normal(1000, 100, shape).astype(np.uint16)


@pytest.mark.parametrize("options", [{}, {"threshold": "otsu"}, {"split": "distance"}])
def test_blocks_change_no_doubt(run, options):
    whole = run(noise(), "whole", **options)
    split = run(noise(), "split", block="13,17,29", **options)
    assert whole.doubts == split.doubts
    assert {"one object", "specks"} & {doubt.about for doubt in whole.doubts}


def test_a_finished_run_again_has_the_same_doubts(tmp_path, tiny_bundle, cheap_engine):
    source = write_image(tmp_path / "image.zarr", noise())
    settings = parse_settings({"model": str(tiny_bundle), "threads": 1, "threshold": "otsu"})
    first, again = (
        segment_here(str(source), str(tmp_path / "out.zarr"), settings) for _ in range(2)
    )
    assert again.already_done
    assert again.doubts == first.doubts != []
    assert json.loads(json.dumps(again.to_json()))["doubts"][0]["about"] == first.doubts[0].about


def test_bright_blobs_are_no_noise(run):
    doubts = run((blobs((24, 50, 70)) > 1500) * np.uint16(1000)).doubts
    assert "noise" not in {doubt.about for doubt in doubts}


@pytest.mark.parametrize("size", [0.5, 0.6])
def test_voxels_far_from_those_of_the_model(size, tmp_path, cheap_engine):
    scale = {"z": size, "y": 0.26, "x": 0.26}
    source = write_image(tmp_path / "image.zarr", blobs((24, 50, 70)), scale=scale)
    settings = parse_settings({"model": "starter", "threads": 1, "overlap": 0})
    result = segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    far = [doubt for doubt in result.doubts if doubt.about == "voxel size"]
    # The starter learnt from voxels of up to 0.5 × 0.3 × 0.3 µm.
    assert len(far) == int(size > 0.5)
    assert all("2.1 × 2.4 × 2.4 times" in doubt.text for doubt in far)
    assert not [text for text in result.warnings if "--voxel-size" in text]


def test_the_report_of_a_doubtful_run_is_not_just_done(run, tmp_path):
    pytest.importorskip("jinja2")
    from megaseg_dask.run.status import find_plans
    from megaseg_dask.tools.report.page import render

    doubts = run(noise()).doubts
    page = render(find_plans(str(tmp_path / "out.zarr")))
    assert '<b class="bad">doubtful</b>' in page
    assert '<b class="good">done</b>' not in page
    for doubt in doubts:
        assert doubt.text in page

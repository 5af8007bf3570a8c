"""What is true of one field of a plate is never assumed of another.

Each field has its own order of channels, place, name, levels and faults. A field that cannot be
done is named, and the others get what a run on each of them alone gives.
"""

import json
import re

import numpy as np
import ome_zarr_models
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_array_equal
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import SettingsError, SourceError, StoreError
from megaseg_dask.events import Started
from megaseg_dask.messages import Narrator
from megaseg_dask.ngff.plate import read_plate
from megaseg_dask.plan.choice import require_segmentable
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.status import status
from megaseg_dask.stores import Location
from tests.fixtures.images import write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here
from tests.stores.test_stores import unreadable

VERSIONS = ["0.4", "0.5"]
PLACED = pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
VERSIONED = pytest.mark.parametrize("version", VERSIONS)

GOOD = {
    "A/1/0": FieldSpec(seed=1, translation=(1.0, 2.0, 3.0), name="first"),
    "A/2/0": FieldSpec(("actin", "dna"), seed=2, translation=(-4.0, 0.5, 7.0), name="second"),
    "B/1/0": FieldSpec(("er", "actin", "dna"), seed=3, outer=(10.0, 20.0, 30.0)),
    "B/2/0": FieldSpec(seed=4, outer=(-1.0, 0.0, 9.5), translation=(0.0, 8.0, 8.0), name="last"),
    "B/2/1": FieldSpec(seed=5),
}
ODD = {
    "A/1/flat": (FieldSpec(shape=(1, 32, 32)), "volumes of .* are too small"),
    "A/1/never": (FieldSpec(n_times=0), "has no voxels"),
    "A/2/blind": (FieldSpec(channels=()), "has no voxels"),
    "A/2/other": (FieldSpec(("er", "golgi")), "has no such channel; it has 0 .er., 1 .golgi."),
    "B/2/no name": (FieldSpec(), "not a valid name of a row, column or field"),
    "B/1/twice": (FieldSpec(("dna", "dna", "actin")), "2 channels of .* match; choose one"),
}


@pytest.fixture
def run(tiny_bundle):
    def call(source, target, emit=lambda _: None, **options):
        options = {
            "model": str(tiny_bundle),
            "threads": 1,
            "overlap": 0,
            "patch": "16,32,32",
            "scores_dtype": "float32",
            **options,
        }
        return segment_here(str(source), str(target), parse_settings(options), emit=emit)

    return call


def multiscale(path) -> dict:
    attributes = zarr.open_group(path, mode="r").attrs.asdict()
    return attributes.get("ome", attributes)["multiscales"][0]


def transforms(entry: dict, axes: str) -> list:
    """All transformations of an image, each where it stands, of some of its axes."""
    kept = [number for number, axis in enumerate(entry["axes"]) if axis["name"] in axes]

    def numbers(owner: dict) -> list:
        found = {"scale": None, "translation": [0.0] * len(kept)}
        for transform in owner.get("coordinateTransformations", []):
            kind = transform["type"]
            found[kind] = [transform[kind][i] for i in kept]
        return [found["scale"], found["translation"]]

    return [numbers(entry), *map(numbers, entry["datasets"])]


def alone(run, folder, spec: FieldSpec, channel: str) -> zarr.Group:
    """A run on one channel of one field, with nothing beside it."""
    source = write_image(folder / "alone.zarr", spec.voxels(channel)[0])
    assert run(source, folder / "alone-out.zarr", overwrite=True).status == "done"
    return zarr.open_group(folder / "alone-out.zarr", mode="r")


@VERSIONED
@PLACED
def test_each_field_is_done_as_it_is_and_named_if_it_cannot(version, in_place, run, tmp_path):
    fields = GOOD | {path: spec for path, (spec, _) in ODD.items()}
    source = write_fields(tmp_path / "plate.zarr", version, fields)
    target = source if in_place else tmp_path / "out.zarr"
    options = {"channel": "dna", "outputs": "labels" if in_place else "labels,scores"}
    if not in_place:
        options["ome_zarr"] = version
    result = run(source, target, **options)
    assert result.exit_code == 1
    reasons = {failure.volume: failure.error for failure in result.failures}
    assert reasons.keys() == ODD.keys()
    for path, (_, reason) in ODD.items():
        assert re.search(reason, reasons[path]), reasons[path]
        assert path in reasons[path]
    for path, spec in GOOD.items():
        out = zarr.open_group(target / path, mode="r")
        expected = alone(run, tmp_path, spec, "dna")
        assert_array_equal(out["labels/megaseg/0"][0].squeeze(), expected["labels/megaseg/0"][:])
        outputs = [target / path / "labels/megaseg"]
        if not in_place:
            assert_array_equal(out["0"][0].squeeze(), expected["0"][:])
            outputs.append(target / path)
        for output in outputs:
            entry = multiscale(output)
            assert entry["name"] == spec.name
            assert transforms(entry, "tzyx") == transforms(multiscale(source / path), "tzyx")
    if not in_place:
        assert [f.path for f in read_plate(Location.of(target)).fields] == list(GOOD)
    # Nothing is done again, and what could not be done is told again.
    events = []
    again = run(source, target, events.append, **options)
    assert again.exit_code == 1
    assert all(event.n_done == event.n_tasks for event in events if isinstance(event, Started))
    failures = [failure for found in status(str(target)) for failure in found.failures]
    assert {failure.volume for failure in failures} == ODD.keys()
    group = zarr.open_group(target, mode="r")
    if not in_place:
        ome_zarr_models.open_ome_zarr(group, version=version)


def test_labels_and_tables_of_several_channels_follow_their_names(run, tmp_path):
    source = write_fields(
        tmp_path / "plate.zarr", "0.5", {p: GOOD[p] for p in ("A/1/0", "A/2/0", "B/1/0")}
    )
    outputs = "labels,scores,measurements"
    result = run(source, tmp_path / "out.zarr", channel="dna,actin", outputs=outputs)
    assert result.status == "done", result.failures
    table = pq.read_table(tmp_path / "out.zarr.measurements.parquet").to_pandas()
    for path, rows in table.groupby(table["well"] + "/" + table["field"]):
        spec = GOOD[path]
        out = zarr.open_group(tmp_path / "out.zarr" / path, mode="r")
        for c, name in enumerate(("dna", "actin")):
            expected = alone(run, tmp_path, spec, name)["labels/megaseg/0"][:]
            assert_array_equal(out["0"][0, c], zarr.open_group(tmp_path / "alone-out.zarr")["0"][:])
            assert_array_equal(out[f"labels/megaseg_{name}/0"][0], expected)
            of_channel = rows[rows["channel_name"] == name]
            assert set(of_channel["channel"]) == {spec.channels.index(name)}
            assert of_channel["intensity_sum"].sum() == spec.voxels(name)[0][expected > 0].sum()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"channel": "dna", "time": "0:2"}, "the source has timepoints 0:1"),
        ({"channel": "dna", "level": "1"}, "volumes of .* are too small"),
        ({"channel": "dna", "roi": "0:16,0:32,0:48"}, "lies partly outside"),
        ({"channel": "2"}, "has no such channel"),
        ({}, "choose one with --channel"),
    ],
)
def test_what_one_field_lacks_is_no_fault_of_another(options, reason, run, tmp_path):
    able = FieldSpec(("dna", "actin", "er"), shape=(16, 64, 64), n_times=2)
    if not options:
        able = FieldSpec(("dna",))
    fields = {"A/1/0": FieldSpec(), "A/1/1": able, "A/1/2": FieldSpec()}
    fields["A/1/0"] = FieldSpec(shape=(16, 24, 24)) if "level" in options else FieldSpec()
    fields["A/1/2"] = fields["A/1/0"]
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    result = run(source, tmp_path / "out.zarr", **options)
    assert sorted(failure.volume for failure in result.failures) == ["A/1/0", "A/1/2"]
    for failure in result.failures:
        assert re.search(reason, failure.error)
    assert [f.path for f in read_plate(Location.of(tmp_path / "out.zarr")).fields] == ["A/1/1"]


@pytest.mark.parametrize("wanted", ["golgi", None])
def test_what_no_field_has_is_a_wrong_request(wanted, run, tmp_path):
    source = write_fields(tmp_path / "plate.zarr", "0.5", {p: GOOD[p] for p in ("A/1/0", "A/2/0")})
    with pytest.raises(SettingsError, match=r"0 \(dna\), 1 \(actin\)"):
        run(source, tmp_path / "out.zarr", channel=wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["plate.zarr"]


def test_a_field_too_large_for_the_memory_does_not_block_the_others(run, tmp_path):
    fields = {"A/1/0": FieldSpec(("dna",)), "A/2/0": FieldSpec(("dna",))}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    # One chunk of 32 GB, of which nothing is stored.
    large = (1, 1, 16, 2**15, 2**15)
    zarr.create_array(source / "A/1/0/0", shape=large, chunks=large, dtype="uint16", overwrite=True)
    result = run(source, tmp_path / "out.zarr", memory="2GB")
    [failure] = result.failures
    assert (failure.volume, "raise --memory" in failure.error) == ("A/1/0", True)
    assert [f.path for f in read_plate(Location.of(tmp_path / "out.zarr")).fields] == ["A/2/0"]


@pytest.mark.parametrize("key", ["zarr.json", "0/zarr.json"])
def test_a_field_that_the_system_cannot_read_blocks_no_other(key, run, tmp_path):
    fields = {path: FieldSpec() for path in ("A/1/0", "A/1/1", "A/2/0")}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    unreadable(source / "A/2/0" / key)
    result = run(source, tmp_path / "out.zarr", channel="dna")
    ((field, error),) = [(failure.volume, failure.error) for failure in result.failures]
    assert field == "A/2/0"
    assert "cannot read" in error
    done = read_plate(Location.of(tmp_path / "out.zarr"))
    assert [field.path for field in done.fields] == ["A/1/0", "A/1/1"]
    # What is recorded goes on once it can be read, and is no wrong request.
    unreadable(source / "A/1/0" / key)
    with pytest.raises(StoreError, match="cannot read"):
        run(source, tmp_path / "out.zarr", channel="dna")


def test_a_chunk_that_the_system_cannot_read_fails_its_field_alone(run, tmp_path):
    fields = {"A/1/0": FieldSpec(seed=1), "A/2/0": FieldSpec(seed=2)}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    unreadable(next(path for path in (source / "A/1/0/0/c").rglob("*") if path.is_file()))
    result = run(source, tmp_path / "out.zarr", channel="dna,actin", retries=0)
    assert {failure.volume.split()[0] for failure in result.failures} == {"A/1/0"}
    done = read_plate(Location.of(tmp_path / "out.zarr"))
    assert [field.path for field in done.fields] == ["A/1/0", "A/2/0"]


# -- which channel is taken

AMBIGUOUS = [
    (["dna", "dna"], "dna", {0, 1}),
    (["1", "gfp"], "1", {0, 1}),
    (["1", "0"], "0", {0, 1}),
    (["index:2", "b", "b"], "b", {1, 2}),
    (["a", "b", "b"], "b,a", {1, 2}),
]


@pytest.mark.parametrize(("names", "wanted", "choices"), AMBIGUOUS)
def test_a_channel_that_can_mean_two_is_refused_and_each_choice_works(
    names, wanted, choices, tmp_path, tiny_bundle
):
    data = np.stack([FieldSpec().voxels(str(c))[0] for c in range(len(names))])
    source = write_image(tmp_path / "image.zarr", data, axes="czyx", channels=names)

    def plan(channel):
        settings = parse_settings({"model": str(tiny_bundle), "channel": channel})
        [(made, _)] = plan_runs(str(source), str(tmp_path / "out.zarr"), settings)
        return made

    with pytest.raises(SettingsError, match=r"2 channels of .* match; choose one") as raised:
        plan(wanted)
    for index in choices:
        assert f"index:{index} ({names[index]})" in str(raised.value)
        made = plan(f"index:{index}")
        assert made.resolved.channels == (index,)
        shown = names[index] if names[index] == str(index) else f"{index} ({names[index]})"
        assert summarize(made)["channels"] == [shown]


def test_plan_and_the_first_line_say_which_channel_is_taken(run, tmp_path, tiny_bundle):
    fields = {path: GOOD[path] for path in ("A/1/0", "A/2/0")}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    lines = []
    narrator = Narrator()
    run(source, tmp_path / "out.zarr", lambda e: lines.extend(narrator.lines(e)), channel="dna")
    begun = [line for line in lines if "; channel " in line]
    assert ["channel 0 (dna)" in begun[0], "channel 1 (dna)" in begun[1]] == [True, True]
    settings = parse_settings({"model": str(tiny_bundle), "channel": "0"})
    [(plan, _)] = plan_runs(str(source), str(tmp_path / "other.zarr"), settings)
    # By index, it is another dye in each.
    assert json.dumps(summarize(plan)["channels"]) == '["0 (actin, dna)"]'


def test_what_is_missing_and_which_fields_are_done_alike_is_told(tiny_bundle, tmp_path):
    fields = {"A/1/0": ("dna", "actin"), "A/2/0": ("actin", "dna"), "B/1/0": ("actin", "er")}
    specs = {path: FieldSpec(channels) for path, channels in fields.items()}
    source = write_fields(tmp_path / "plate.zarr", "0.5", specs)
    target = str(tmp_path / "out.zarr")
    options = ["--model", str(tiny_bundle), "--channel", "dna", "--overlap", "0"]

    def megaseg(*words) -> tuple[int, str]:
        done = CliRunner().invoke(build_app(), list(map(str, words)))
        return done.exit_code, done.output

    code, text = megaseg("plan", source, target, *options)
    assert code == 1
    assert re.search("B/1/0: --channel dna: .*has no such channel", text)
    assert "field A/1/0; channel 0 (dna)" in text
    assert "field A/2/0; channel 1 (dna)" in text
    code, text = megaseg("plan", source, target, *options, "--json")
    plan = json.loads(text.splitlines()[-1])
    (further,) = plan["further_runs"]
    assert (code, plan["exit_code"], list(further["missing"])) == (1, 1, ["B/1/0"])
    assert (plan["field_paths"], further["field_paths"]) == (["A/1/0"], ["A/2/0"])
    assert megaseg("plan", source, target, *options, "--wells", "A/*")[0] == 0
    code, text = megaseg("segment", source, target, *options, "--workers", "0")
    assert code == 1
    assert "1 task; field A/2/0; channel 1 (dna)" in text
    code, text = megaseg("status", target)
    assert code == 1
    assert "megaseg+2: failed  (field A/2/0; channel 1 (dna))" in text
    assert "run the same segment command again" in text
    assert "megaseg join" not in text


# -- what cannot be published is not computed


def mirrored(path) -> None:
    """Make x of an image negative, as some stages write it."""
    group = zarr.open_group(path, mode="r+")
    attributes = group.attrs.asdict()
    entry = attributes.get("ome", attributes)["multiscales"][0]
    for dataset in entry["datasets"]:
        dataset["coordinateTransformations"][0]["scale"][-1] *= -1
    group.attrs.put(attributes)


@VERSIONED
@PLACED
def test_a_pyramid_that_cannot_be_valid_is_refused_before_anything_is_done(
    version, in_place, run, tmp_path
):
    fields = {"A/1/0": FieldSpec(("dna",)), "A/2/0": FieldSpec(("dna",))}
    source = write_fields(tmp_path / "plate.zarr", version, fields)
    mirrored(source / "A/1/0")
    target = source if in_place else tmp_path / "out.zarr"
    options = {"outputs": "labels" if in_place else "labels,scores"}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SourceError, match=r"x has scale -0\.5, and a pyramid with a negative"):
        run(source / "A/1/0", target / "A/1/0" if in_place else target, **options)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    result = run(source, target, **options)
    assert [failure.volume for failure in result.failures] == ["A/1/0"]
    assert (zarr.open_group(target / "A/2/0", mode="r")["labels/megaseg/0"][:] > 0).any()


def test_one_level_with_a_negative_scale_has_sizes_and_labels_in_place(run, tmp_path):
    source = write_image(
        tmp_path / "image.zarr", FieldSpec().voxels("dna")[0], scale={"z": 0.5, "y": 0.2, "x": 0.2}
    )
    mirrored(source)
    result = run(source, tmp_path / "out.zarr", outputs="labels,scores,measurements")
    assert result.status == "done", result.failures
    table = pq.read_table(tmp_path / "out.zarr.measurements.parquet").to_pandas()
    np.testing.assert_allclose(table["volume_um3"], table["volume_voxels"] * 0.5 * 0.2 * 0.2)
    for path in ("out.zarr", "out.zarr/labels/megaseg"):
        found = transforms(multiscale(tmp_path / path), "zyx")
        assert found == transforms(multiscale(source), "zyx")


@pytest.mark.parametrize("dtype", ["[('a', '<i4')]", "StringDType()", "<U4", "complex64"])
def test_voxels_that_are_no_numbers_are_named(dtype):
    with pytest.raises(SourceError, match="expected integers or floats"):
        require_segmentable("field", (16, 32, 32), dtype)

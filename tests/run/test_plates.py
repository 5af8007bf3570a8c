"""Plates, channels and regions.

Each field, channel and region gets what the run of it alone would give.
"""

import json
import shutil
import time
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_array_equal
from pandas.testing import assert_frame_equal

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.ngff.plate import Acquisition, Field, Plate, read_plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.status import status
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (16, 40, 44)
CHANNELS = ["dna", "actin"]


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    def call(source, target, emit=lambda _: None, **options):
        options = {
            "model": str(tiny_bundle),
            "threads": 1,
            "overlap": 0,
            "scores_dtype": "float32",
            **options,
        }
        return segment_here(str(source), str(tmp_path / target), parse_settings(options), emit=emit)

    return call


def field_image(number: int) -> np.ndarray:
    return np.stack(
        [[blobs(SHAPE, seed=100 * number + 10 * t + c) for c in range(2)] for t in range(2)]
    )


# Fields of 0.4 are done in tests/run/test_plate_fields.py too.
@pytest.fixture(params=["0.5", pytest.param("0.4", marks=pytest.mark.slow)])
def plate(request, tmp_path):
    fields = [
        Field(row, column, name, 0) for row in "AB" for column in ("1", "2") for name in ("0", "1")
    ]
    made = Plate(
        request.param, "screen", ("A", "B"), ("1", "2"), tuple(fields), (Acquisition(0, "day"),)
    )
    folder = tmp_path / "plate.zarr"
    write_plate(Location.of(folder), made, request.param)
    for number, field in enumerate(fields):
        write_image(
            folder / field.path,
            field_image(number),
            axes="tczyx",
            version=request.param,
            channels=CHANNELS,
        )
    return folder


def arrays(folder) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        # Of tables, which are no part of Zarr.
        warnings.simplefilter("ignore")
        members = zarr.open_group(folder, mode="r").members(max_depth=None)
    return {path: a[...] for path, a in members if isinstance(a, zarr.Array)}


def test_a_plate_is_its_fields(run, plate, tmp_path):
    result = run(
        plate,
        "out.zarr",
        channel="dna,actin",
        outputs="labels,scores",
        ome_zarr=read_plate(Location.of(plate)).version,
    )
    assert result.status == "done", result.failures
    found = read_plate(Location.of(tmp_path / "out.zarr"))
    assert [f.path for f in found.fields] == [
        f"{r}/{c}/{n}" for r in "AB" for c in "12" for n in "01"
    ]
    assert not found.missing
    n_objects = 0
    for number, field in enumerate(found.fields):
        here = arrays(tmp_path / "out.zarr" / field.path)
        assert here["0"].shape == (2, 2, *SHAPE)
        for c, channel in enumerate(CHANNELS):
            labels = here[f"labels/megaseg_{channel}/0"]
            n_objects += sum(int(volume.max()) for volume in labels)
            # A field of each row, of each column and of each name.
            if number not in (1, 6):
                continue
            alone = f"alone-{number}-{c}.zarr"
            run(plate / field.path, alone, channel=channel)
            expected = arrays(tmp_path / alone)
            assert_array_equal(here["0"][:, c], expected["0"])
            assert_array_equal(labels, expected["labels/megaseg/0"])
        attributes = zarr.open_group(tmp_path / "out.zarr" / field.path, mode="r").attrs["megaseg"]
        assert len(attributes["normalization"]) == 4
        assert attributes["missing_boxes"] == []
    assert result.n_objects == n_objects
    assert run(
        plate, "out.zarr", channel="dna,actin", outputs="labels,scores", ome_zarr=found.version
    ).already_done


def test_some_wells_and_fields(run, plate, tmp_path):
    assert run(plate, "out.zarr", channel="dna", wells="A/*", fields="1", time="1").status == "done"
    found = read_plate(Location.of(tmp_path / "out.zarr"))
    assert [f.path for f in found.fields] == ["A/1/1", "A/2/1"]
    with pytest.raises(SettingsError, match="C/1"):
        run(plate, "other.zarr", channel="dna", wells="C/1")


def test_labels_in_the_fields_of_the_source(run, plate, tmp_path):
    before = {p: p.read_bytes() for p in plate.rglob("*") if p.is_file()}
    assert run(plate, "plate.zarr", channel="dna", outputs="labels").status == "done"
    assert {p: p.read_bytes() for p in before} == before
    assert run(plate, "apart.zarr", channel="dna").status == "done"
    for field in read_plate(Location.of(plate)).fields:
        inside = zarr.open_group(plate / field.path, mode="r")["labels/megaseg/0"][...]
        assert_array_equal(inside, arrays(tmp_path / "apart.zarr" / field.path)["labels/megaseg/0"])


def test_a_plate_of_labels_alone_has_no_images(run, plate, tmp_path):
    with pytest.raises(SettingsError, match="add scores to --outputs"):
        run(plate, "out.zarr", channel="dna", outputs="labels,measurements")
    assert not (tmp_path / "out.zarr").exists()


def test_a_field_that_is_not_there_is_named_and_the_others_are_done(run, plate, tmp_path):
    shutil.rmtree(plate / "B/2/1")
    events = []
    result = run(plate, "out.zarr", events.append, channel="dna")
    assert result.exit_code == 1
    assert [f.volume for f in result.failures] == ["B/2/1"]
    assert [event.volume for event in events if event.kind == "failure"] == ["B/2/1"]
    assert len(read_plate(Location.of(tmp_path / "out.zarr")).fields) == 7


ALL = [f"{r}/{c}/{n}" for r in "AB" for c in "12" for n in "01"]


def listed(target) -> list[str]:
    return [field.path for field in read_plate(Location.of(target)).fields]


def test_a_field_that_is_mended_later_is_added_by_the_same_command(run, plate, tmp_path):
    shutil.move(plate / "B/1/1", tmp_path / "aside")
    options = {"channel": "dna", "outputs": "labels,scores,measurements"}
    first = run(plate, "out.zarr", **options)
    assert [f.volume for f in first.failures] == ["B/1/1"]
    assert run(plate, "out.zarr", **options).exit_code == 1
    shutil.move(tmp_path / "aside", plate / "B/1/1")
    result = run(plate, "out.zarr", **options)
    assert result.status == "done", result.failures
    assert listed(tmp_path / "out.zarr") == ALL
    whole = run(plate, "whole.zarr", **options)
    assert result.n_objects == whole.n_objects
    found, expected = arrays(tmp_path / "out.zarr"), arrays(tmp_path / "whole.zarr")
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        assert_array_equal(found[path], values)
    tables = [
        pq.read_table(tmp_path / f"{name}.zarr.measurements.parquet").to_pandas()
        for name in ("out", "whole")
    ]
    in_order = [
        t.sort_values(["well", "field", "timepoint", "label"], ignore_index=True) for t in tables
    ]
    assert_frame_equal(*in_order)
    assert run(plate, "out.zarr", **options).already_done


def test_wells_one_after_the_other_make_one_plate(run, plate, tmp_path):
    target = tmp_path / "out.zarr"
    assert run(plate, "out.zarr", channel="dna", wells="B/*").status == "done"
    assert listed(target) == ALL[4:]
    assert run(plate, "out.zarr", channel="dna", wells="A/1", fields="1").status == "done"
    assert listed(target) == [ALL[1], *ALL[4:]]
    assert run(plate, "out.zarr", channel="dna", wells="B/*").already_done
    with pytest.raises(TargetError, match="on 4 fields, and B/1/1 is not chosen"):
        run(plate, "out.zarr", channel="dna", fields="0")
    with pytest.raises(
        TargetError, match=r"computed with different options \(threshold: was 0\.5, now 0\.7\)"
    ):
        run(plate, "out.zarr", channel="dna", wells="A/2", threshold=0.7)
    with pytest.raises(TargetError, match=r"belongs to another run \(threshold"):
        run(plate, "out.zarr", channel="dna", threshold=0.7)
    assert listed(target) == [ALL[1], *ALL[4:]]
    assert run(plate, "out.zarr", channel="dna").status == "done"
    assert listed(target) == ALL
    assert [s.label_name for s in status(str(target))] == ["megaseg", "megaseg+2", "megaseg+3"]
    assert run(plate, "out.zarr", channel="dna").already_done


def test_overwriting_some_wells_keeps_the_others(run, plate, tmp_path):
    target = tmp_path / "out.zarr"
    for wells in ("A/1", "A/2", "B/*"):
        assert run(plate, "out.zarr", channel="dna", wells=wells).status == "done"
    before = arrays(target)
    with pytest.raises(
        TargetError, match=r"computed with different options .* --overwrite all of them"
    ):
        run(plate, "out.zarr", channel="dna", wells="B/1", threshold=0.7, overwrite=True)
    assert run(plate, "out.zarr", channel="dna", wells="A/*", overwrite=True).status == "done"
    assert listed(target) == ALL
    for path, values in arrays(target).items():
        assert_array_equal(values, before[path])
    # The run on A/2 is part of that on A/* now.
    assert [s.label_name for s in status(str(target))] == ["megaseg", "megaseg+3"]
    assert run(plate, "out.zarr", channel="dna").already_done


def test_fields_of_several_forms_are_done_one_form_after_the_other(run, plate, tmp_path):
    version = read_plate(Location.of(plate)).version
    odd = {"A/1/1": (20, 40, 44), "B/2/1": (20, 40, 44), "B/1/0": (16, 32, 70)}
    for number, (path, shape) in enumerate(odd.items()):
        shutil.rmtree(plate / path)
        write_image(plate / path, blobs(shape, seed=number), version=version)
    options = {"channel": "0", "ome_zarr": version, "outputs": "labels,scores,measurements"}

    def interrupt(event):
        if event.kind == "started" and len(began) < 1:
            began.append(event)
        elif event.kind == "started":
            raise KeyboardInterrupt

    began = []
    with pytest.raises(KeyboardInterrupt):
        run(plate, "out.zarr", emit=interrupt, **options)
    assert [s.exit_code for s in status(str(tmp_path / "out.zarr"))] == [0, 3, 3]
    result = run(plate, "out.zarr", **options)
    assert result.status == "done", result.failures
    assert listed(tmp_path / "out.zarr") == ALL
    for path in [*odd, ALL[0]]:
        alone = f"alone-{path.replace('/', '-')}.zarr"
        assert run(plate / path, alone, **{**options, "outputs": "labels,scores"}).status == "done"
        here = arrays(tmp_path / "out.zarr" / path)
        for name, values in arrays(tmp_path / alone).items():
            assert_array_equal(here[name], values)
    table = pq.read_table(tmp_path / "out.zarr.measurements.parquet").to_pandas()
    assert len(table) == result.n_objects
    assert {f"{w}/{f}" for w, f in zip(table.well, table.field, strict=True)} == set(ALL)
    assert run(plate, "out.zarr", **options).already_done


def test_labels_in_a_source_of_several_forms(run, plate):
    version = read_plate(Location.of(plate)).version
    shutil.rmtree(plate / "B/2/1")
    write_image(plate / "B/2/1", blobs((20, 40, 44)), version=version)
    assert run(plate, "plate.zarr", channel="0", outputs="labels", wells="B/2").status == "done"
    assert run(plate, "plate.zarr", channel="0", outputs="labels").status == "done"
    assert listed(plate) == ALL
    for path in ALL:
        assert (arrays(plate / path)["labels/megaseg/0"] > 0).any()


ROIS = ["0:24,0:50,0:70", "3:20,10:41,20:63", "8:9,0:50,69:70"]


@pytest.mark.parametrize("roi", ROIS)
@pytest.mark.parametrize(
    "options", [{}, {"normalization": "1000,400"}, {"block": "7,13,17", "threshold": "otsu"}]
)
def test_a_region_is_the_crop_of_the_whole(roi, options, run, tmp_path):
    from skimage.measure import label

    source = write_image(
        tmp_path / "image.zarr", blobs((24, 50, 70)), scale={"z": 0.5, "y": 0.2, "x": 0.2}
    )
    fixed = {k: v for k, v in options.items() if k == "normalization"}
    assert run(source, "whole.zarr", **fixed, overlap=0.25).status == "done"
    result = run(source, "roi.zarr", roi=roi, overlap=0.25, outputs="labels,scores,mask", **options)
    assert result.status == "done", result.failures
    place = tuple(slice(*map(int, part.split(":"))) for part in roi.split(","))
    found = arrays(tmp_path / "roi.zarr")
    assert_array_equal(found["0"], arrays(tmp_path / "whole.zarr")["0"][place])
    assert_array_equal(found["labels/megaseg/0"] > 0, found["labels/megaseg_mask/0"])
    if min(found["0"].shape) > 1:
        assert_array_equal(
            found["labels/megaseg/0"], label(found["labels/megaseg_mask/0"], connectivity=1)
        )
    ome = dict(zarr.open_group(tmp_path / "roi.zarr", mode="r").attrs)["ome"]
    transforms = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    origin = [p.start * s for p, s in zip(place, (0.5, 0.2, 0.2), strict=True)]
    assert next(
        (t["translation"] for t in transforms if t["type"] == "translation"), [0, 0, 0]
    ) == pytest.approx(origin)


def test_a_region_beyond_the_volume_is_told(run, tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    with pytest.raises(SettingsError, match="lies partly outside"):
        run(source, "out.zarr", roi="0:16,0:41,0:44")
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["image.zarr"]'


def test_each_field_lists_the_tables_of_all_channels(run, plate, tmp_path, monkeypatch):
    put = Location.put

    def put_late(self, name, data, *args, **kwargs):
        # A reader of the list that does not wait for its writer would now see the old list.
        if self.basename == "tables":
            time.sleep(0.02)
        return put(self, name, data, *args, **kwargs)

    monkeypatch.setattr(Location, "put", put_late)
    options = {"channel": "dna,actin", "outputs": "labels,scores,measurements", "time": "0:1"}
    assert run(plate, "out.zarr", **options).status == "done"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in ALL:
            tables = zarr.open_group(tmp_path / "out.zarr" / path / "tables", mode="r")
            assert tables.attrs["tables"] == ["megaseg_dna", "megaseg_actin"]

"""Images of OME-Zarr 0.6: what their coordinate systems are reduced to, and what is refused."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.errors import SourceError
from megaseg_dask.ngff.coordinate_systems import in_version_05
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.plate import read_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (24, 64, 96)
SCALE = {"z": 0.5, "y": 0.25, "x": 0.25}
UM = "micrometer"
AXES = [{"name": name, "type": "space", "unit": UM} for name in "zyx"]
INTRINSIC = {"name": "physical", "axes": AXES}


def as_06(path, transforms=None, *, systems=(INTRINSIC,), others=(), output=None, version="0.6rc0"):
    """Rewrite the metadata of an image of 0.5 as those of 0.6."""
    document = json.loads((path / "zarr.json").read_text())
    ome = document["attributes"]["ome"]
    entry = ome["multiscales"][0]
    del entry["axes"]
    entry["coordinateSystems"] = list(systems)
    for number, dataset in enumerate(entry["datasets"]):
        (scale,) = dataset["coordinateTransformations"]
        transform = transforms[number] if transforms else scale
        ends = {"input": {"path": dataset["path"]}, "output": output or {"name": "physical"}}
        dataset["coordinateTransformations"] = [{**transform, **ends}]
    if others:
        entry["coordinateTransformations"] = list(others)
    ome["version"] = version
    (path / "zarr.json").write_text(json.dumps(document))
    return path


@pytest.fixture
def image(tmp_path):
    data = blobs(SHAPE)
    return write_image(tmp_path / "image.zarr", data, data[:, ::2, ::2], scale=SCALE)


@pytest.mark.parametrize("output", [{"name": "physical"}, "physical"])
@pytest.mark.parametrize("version", ["0.6rc0", "0.6.dev4", "0.6", None])
def test_an_image_of_06_is_that_of_05(output, version, image):
    expected = read_image(Location.of(image))
    found = read_image(Location.of(as_06(image, output=output, version=version)))
    assert found.is_reduced
    assert not expected.is_reduced
    assert (found.axes, found.levels, found.dtype) == (
        expected.axes,
        expected.levels,
        expected.dtype,
    )
    assert found.spacing_um == (0.5, 0.25, 0.25)


def test_other_systems_are_not_read(image):
    expected = read_image(Location.of(image))
    atlas = {"name": "atlas", "axes": [{"name": "dim_0"}, {"name": "dim_1"}]}
    rotation = {
        "type": "rotation",
        "rotation": [[0, 1, 0], [1, 0, 0], [0, 0, 1]],
        "input": {"name": "physical"},
        "output": {"name": "atlas"},
    }
    path = as_06(image, systems=[atlas, INTRINSIC], others=[rotation])
    assert read_image(Location.of(path)).levels == expected.levels


VECTORS = st.lists(st.floats(0.01, 100), min_size=3, max_size=3)
STEPS = st.one_of(
    st.builds(lambda values: {"type": "scale", "scale": values}, VECTORS),
    st.builds(lambda values: {"type": "translation", "translation": values}, VECTORS),
    st.just({"type": "identity"}),
)
SEQUENCES = st.recursive(
    STEPS,
    lambda parts: st.builds(
        lambda listed: {"type": "sequence", "transformations": listed},
        st.lists(parts, max_size=4),
    ),
    max_leaves=8,
)


def moved(transform, point):
    """A point as the specification's rules move it, one transformation after the other."""
    match transform["type"]:
        case "sequence":
            for part in transform["transformations"]:
                point = moved(part, point)
            return point
        case "scale":
            return point * np.array(transform["scale"])
        case "translation":
            return point + np.array(transform["translation"])
    return point


@given(SEQUENCES, VECTORS)
def test_a_sequence_is_one_scale_and_one_translation(transform, point):
    ends = {"input": {"path": "0"}, "output": {"name": "physical"}}
    dataset = {"path": "0", "coordinateTransformations": [{**transform, **ends}]}
    entry = {"coordinateSystems": [INTRINSIC], "datasets": [dataset]}
    reduced = in_version_05(Location("/a"), {"version": "0.6rc0", "multiscales": [entry]})
    assert reduced["version"] == "0.5"
    found = np.array(point)
    for part in reduced["multiscales"][0]["datasets"][0]["coordinateTransformations"]:
        found = moved(part, found)
    assert_allclose(found, moved(transform, np.array(point)), rtol=1e-9)


REFUSED = {
    "affine": (
        {"transforms": [{"type": "affine", "affine": [[1, 0, 0, 0]] * 3}] * 2},
        "level '0' has a transformation of type 'affine'",
    ),
    "rotation in a sequence": (
        {"transforms": [{"type": "sequence", "transformations": [{"type": "rotation"}]}] * 2},
        "level '0' has a transformation of type 'rotation'",
    ),
    "a displacement field": (
        {"transforms": [{"type": "displacements", "path": "field"}] * 2},
        "transformation of type 'displacements'",
    ),
    "numbers in a file": (
        {"transforms": [{"type": "scale", "path": "numbers"}] * 2},
        "scale that is no list of numbers in the metadata",
    ),
    "too few numbers": ({"transforms": [{"type": "scale", "scale": [1, 1]}] * 2}, "0.6 .* invalid"),
    "no such system": ({"output": {"name": "other"}}, "coordinateSystems have no axes"),
    "no system": ({"systems": []}, "coordinateSystems have no axes"),
    "no names": ({"systems": [{"name": "physical", "axes": [{}] * 3}]}, "an axis of 'physical'"),
    "two dimensions": (
        {"systems": [{"name": "physical", "axes": AXES[1:]}]},
        "no z; the model needs 3D volumes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_reduced_is_named(case, image):
    options, words = REFUSED[case]
    with pytest.raises(SourceError, match=words) as caught:
        read_image(Location.of(as_06(image, **options)))
    assert str(image) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_levels_of_two_systems_are_refused(image):
    path = as_06(image) / "zarr.json"
    path.write_text(re.sub("physical", "other", path.read_text(), count=1))
    with pytest.raises(SourceError, match=r"several coordinate systems \(other, physical\)"):
        read_image(Location.of(image))


def test_a_run_writes_05_and_labels_cannot_be_written_into_06(
    image, tmp_path, tiny_bundle, cheap_engine
):
    settings = parse_settings({"model": str(tiny_bundle), "threads": 1, "outputs": "labels"})
    old, new = tmp_path / "old.zarr", tmp_path / "new.zarr"
    assert segment_here(str(image), str(old), settings).status == "done"
    as_06(image)
    assert segment_here(str(image), str(new), settings).status == "done"
    images = [read_image(Location.of(each / "labels/megaseg")) for each in (old, new)]
    assert images[0] == images[1]
    chunks = [(each / "labels/megaseg/0/c/0/0/0").read_bytes() for each in (old, new)]
    assert_array_equal(*[np.frombuffer(each, "u1") for each in chunks])
    with pytest.raises(
        SourceError, match=r"is OME-Zarr 0\.6, which megaseg reads but does not write"
    ):
        segment_here(str(image), str(image), settings)


def test_a_plate_of_06(tmp_path):
    wells = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}]
    plate = {"rows": [{"name": "A"}], "columns": [{"name": "1"}], "wells": wells}
    for folder, part in (("", {"plate": plate}), ("A/1", {"well": {"images": [{"path": "0"}]}})):
        (tmp_path / "p" / folder).mkdir(parents=True, exist_ok=True)
        ome = {"version": "0.6rc0", **part}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": ome}}
        (tmp_path / "p" / folder / "zarr.json").write_text(json.dumps(group))
    assert [field.path for field in read_plate(Location.of(tmp_path / "p")).fields] == ["A/1/0"]

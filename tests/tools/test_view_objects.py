"""What the viewer says and draws of single objects, and of thresholds."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from skimage.measure import label, regionprops

from megaseg_dask.algorithms.blending import mask_of_scores
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.measurements import measure_block, to_columns
from megaseg_dask.errors import SettingsError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.tables import ImageTable, Place
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.job_array import record_plans
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.contrast import find_limits
from megaseg_dask.tools.view.gallery import SCORES, Gallery
from megaseg_dask.tools.view.made_arrays import Backdrop, attribute_documents
from megaseg_dask.tools.view.meshes import Meshes
from megaseg_dask.tools.view.neuroglancer_state import state_of
from megaseg_dask.tools.view.objects import read_objects
from megaseg_dask.tools.view.outlines import Outlines
from megaseg_dask.tools.view.threshold import View, count_in_view
from megaseg_dask.tools.view.viewer import Session, view
from tests.fixtures.images import blobs, with_border, write_image
from tests.fixtures.runs import segment_here
from tests.tools.test_view import Urls

SHAPE = (10, 300, 40)
OPTIONS = {"threads": 1, "engine": "torch", "precision": "fp32"}
SCALE = {"t": 1.0, "z": 0.5, "y": 0.2, "x": 0.2}


def halved(data: np.ndarray) -> np.ndarray:
    return data[..., ::2, ::2]


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Labels of two timepoints; objects cross the borders of chunks of outlines."""
    masks = [blobs(SHAPE, seed=seed) > 1300 for seed in (1, 2)]
    return np.stack([label(mask) for mask in masks]).astype(np.uint32)


@pytest.fixture(scope="module")
def image(tmp_path_factory, labels) -> Path:
    path = tmp_path_factory.mktemp("objects") / "cells.zarr"
    pixels = np.stack([blobs(SHAPE, seed=seed) for seed in (1, 2)])
    write_image(path, pixels, halved(pixels), axes="tzyx", scale=SCALE)
    for name in ("nuclei", "others"):
        place = path / "labels" / name
        write_image(place, labels, halved(labels), axes="tzyx", scale=SCALE)
    group = zarr.open_group(path / "labels", mode="a", zarr_format=3)
    group.attrs["ome"] = {"version": "0.5", "labels": ["nuclei", "others"]}
    return path


@pytest.fixture(scope="module")
def layer(image):
    return Gallery(str(image)).scene("").layers[1]


def test_one_of_several_label_images_is_shown_at_first(image):
    layers = Gallery(str(image), truth="others").scene("").layers
    assert [(layer.name, layer.visible) for layer in layers] == [
        ("image", True),
        ("labels nuclei", True),
        ("truth", True),
    ]
    layers = Gallery(str(image)).scene("").layers
    assert [layer.visible for layer in layers] == [True, True, False]


def test_true_labels_that_are_none_are_named(image, tmp_path):
    with pytest.raises(SettingsError, match=r"does not exist.*label images nuclei, others"):
        Gallery(str(image), truth=str(tmp_path / "none.zarr")).scene("")
    with pytest.raises(SettingsError, match="labels/nuclei"):
        Gallery(str(image), truth=str(image)).scene("")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_true_labels_of_the_same_voxels_lie_on_the_image(image, labels, tmp_path, version):
    path = write_image(tmp_path / "t.zarr", labels, halved(labels), axes="tzyx", version=version)
    scene = Gallery(str(image), truth=str(path), unmarked=True).scene("")
    truth = scene.layers[-1]
    for level in (0, 1):
        scale, offset = truth.image.transform(level)
        assert scale == pytest.approx(scene.layers[0].image.transform(level)[0])
        assert offset[2:] == pytest.approx((0.1 * level, 0.1 * level))
    # It is served so, to be read by others.
    for name, document in attribute_documents(truth.image).items():
        (path / name).write_bytes(document)
    served = read_image(Location.of(path))
    assert served.transform(1) == truth.image.transform(1)
    other = write_image(tmp_path / "o.zarr", labels[:, :5], axes="tzyx")
    truth = Gallery(str(image), truth=str(other), unmarked=True).scene("").layers[-1]
    assert truth.image.transform()[0] == (1, 1, 1, 1)


# -- sizes and places


@pytest.mark.parametrize("t", [0, 1])
def test_counted_objects_are_those_of_regionprops(layer, labels, t):
    found = read_objects(layer, t)
    expected = regionprops(labels[t])
    assert found.is_exact
    assert found.label.tolist() == [region.label for region in expected]
    assert found.n_voxels.tolist() == [region.num_pixels for region in expected]
    np.testing.assert_allclose(found.centroid.T, [region.centroid for region in expected])
    boxes = [found.box_of(row) for row in range(len(expected))]
    assert [(*box.start, *box.stop) for box in boxes] == [region.bbox for region in expected]
    np.testing.assert_allclose(found.volume_um3, found.n_voxels * 0.5 * 0.2 * 0.2)


def test_a_table_beside_the_labels_is_used(image, layer, labels):
    rows = []
    for t in range(2):
        framed, pixels = with_border(labels[t], labels[t].astype(np.uint16), Box.of(SHAPE))
        sums = measure_block(framed, pixels, Box.of(SHAPE))
        rows.append((Place(t, 0), to_columns(sums, SHAPE, (0.5, 0.2, 0.2))))
    # What nobody would count: it shows where the numbers come from.
    rows[1][1]["volume_voxels"][0] = 12345
    table = ImageTable(Location.of(image), "nuclei")
    table.write("0.5", rows, label_name="nuclei", provenance={}, has_times=True)
    read_objects.cache_clear()
    try:
        assert read_objects(layer, 1).n_voxels[0] == 12345
        assert read_objects(layer, 0).intensity_mean[0] == 1
    finally:
        table.location.remove()
        read_objects.cache_clear()


def test_large_images_are_counted_at_a_coarser_level(layer, labels, monkeypatch):
    monkeypatch.setattr("megaseg_dask.tools.view.objects._MAX_COUNTED_VOXELS", labels[0].size // 2)
    read_objects.cache_clear()
    found = read_objects(layer, 0)
    read_objects.cache_clear()
    assert not found.is_exact
    exact = {region.label: region for region in regionprops(labels[0])}
    largest = found.label[np.argmax(found.n_voxels)]
    row = found.row_of(largest)
    assert found.n_voxels[row] == pytest.approx(exact[largest].num_pixels, rel=0.1)
    np.testing.assert_allclose(found.centroid[:, row], exact[largest].centroid, atol=1)


def test_questions_about_objects(image, labels):
    session = Session(Gallery(str(image)), Urls())
    session.scene({})
    asked = {"field": "", "layer": 1, "position": {"x": 1, "y": 1, "z": 1, "t": 1}}
    region = regionprops(labels[1])[4]
    found = session.object({**asked, "id": region.label})
    assert found["n_voxels"] == region.num_pixels
    assert list(found["position"].values()) == pytest.approx(region.centroid)
    assert not session.object({**asked, "id": 10**9})["found"]
    sizes = session.sizes(asked)
    assert sizes["sizes"] == sorted(sizes["sizes"], reverse=True)
    assert len(sizes["ids"]) == labels[1].max()
    assert session.meshes(asked)["source"].startswith("http://here/meshes/labels nuclei/1/")
    json.dumps([found, sizes])
    for wrong in ({"layer": 0}, {"layer": 9}, {"field": "B/1/0"}, {"position": {"t": 7}}):
        with pytest.raises(SettingsError):
            session.sizes({**asked, **wrong})
    assert session.status({}) == {"notice": ""}


# -- outlines and meshes


def on_outlines(plane: np.ndarray) -> np.ndarray:
    """Ids where a neighbor to the left, right, above or below is another one."""
    framed = np.pad(plane, 1)
    moved = [np.roll(framed, shift, axis) for axis in (0, 1) for shift in (1, -1)]
    differs = np.any([other != framed for other in moved], axis=0)
    return np.where(differs, framed, 0)[1:-1, 1:-1]


def test_outlines_are_an_image_that_others_read(layer, labels, tmp_path):
    outlines = Outlines(layer)
    keys = ["zarr.json", "0/zarr.json", "1/zarr.json"]
    keys += [f"0/c/{t}/{z}/{y}/0" for t in (0, 1) for z in (0, 1) for y in (0, 1)]
    keys += ["1/c/1/0/0/0", "1/c/1/1/0/0"]
    for key in keys:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(outlines.get(key))
    group = zarr.open_group(tmp_path, mode="r")
    assert group.attrs["ome"]["multiscales"][0]["datasets"][0]["path"] == "0"
    for t in (0, 1):
        expected = np.stack([on_outlines(plane) for plane in labels[t]])
        np.testing.assert_array_equal(group["0"][t], expected)
    np.testing.assert_array_equal(group["1"][1, 3], on_outlines(halved(labels)[1, 3]))


def test_the_backdrop_is_as_large_as_the_image(tmp_path):
    scales = {"z": 0.0, "y": 0.2, "x": -0.5}
    path = write_image(tmp_path / "a.zarr", blobs((4, 6, 8)), scale=scales)
    backdrop = Backdrop(Gallery(str(path)).scene(""))
    for key in ("zarr.json", "0/zarr.json", "0/c/0/0/0"):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(backdrop.get(key))
    assert zarr.open_array(tmp_path / "0", mode="r")[...].tolist() == [[[0]]]
    image = read_image(Location.of(tmp_path))
    scale, offset = image.transform()
    assert scale == pytest.approx((4, 1.2, 4))
    assert offset == pytest.approx((1.5, 0.5, 1.75))
    assert backdrop.get("1/zarr.json") is None


@pytest.mark.parametrize("key", ["0/c/0/0/9/0", "0/c/0/0/0", "0/c/a/0/0/0", "2/zarr.json", "0/x"])
def test_there_are_no_other_outlines(layer, key):
    assert Outlines(layer).get(key) is None


def test_meshes_are_in_neuroglancers_form(layer, labels):
    meshes = Meshes(layer, 1)
    assert json.loads(meshes.get("info")) == {"@type": "neuroglancer_legacy_mesh"}
    region = max(regionprops(labels[1]), key=lambda region: region.num_pixels)
    (fragment,) = json.loads(meshes.get(f"{region.label}:0"))["fragments"]
    data = meshes.get(fragment)
    n_corners = int(np.frombuffer(data, "<u4", 1)[0])
    corners = np.frombuffer(data, "<f4", 3 * n_corners, 4).reshape(-1, 3)
    triangles = np.frombuffer(data, "<u4", -1, 4 + 12 * n_corners).reshape(-1, 3)
    assert triangles.max() == n_corners - 1
    # x first; surfaces are half a voxel beyond the centers.
    assert corners.min(axis=0).tolist() == [a - 0.5 for a in region.bbox[2::-1]]
    assert corners.max(axis=0).tolist() == [b - 0.5 for b in region.bbox[:2:-1]]
    assert meshes.get("999999999") is None
    assert meshes.get("../info") is None


def test_large_objects_have_coarser_meshes(layer, labels, monkeypatch):
    region = max(regionprops(labels[1]), key=lambda region: region.num_pixels)
    exact = Meshes(layer, 1).get(str(region.label))
    monkeypatch.setattr("megaseg_dask.tools.view.meshes._MAX_MESH_VOXELS", 100)
    coarse = Meshes(layer, 1).get(str(region.label))
    assert 0 < len(coarse) < len(exact) / 2
    n_corners = int(np.frombuffer(coarse, "<u4", 1)[0])
    corners = np.frombuffer(coarse, "<f4", 3 * n_corners, 4).reshape(-1, 3)
    middle = (np.array(region.bbox[:3]) + region.bbox[3:] - 1)[::-1] / 2
    np.testing.assert_allclose((corners.min(axis=0) + corners.max(axis=0)) / 2, middle, atol=6)


# -- thresholds


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    values = blobs((10, 120, 90), seed=5).astype(float)
    return np.rint(values / values.max() * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scored(tmp_path_factory, scores):
    path = write_image(tmp_path_factory.mktemp("scores") / "s.zarr", scores, halved(scores))
    return Gallery(str(path)).scene("").layers[0]


def test_stored_scores_are_above_255_times_the_threshold():
    stored = np.arange(256, dtype=np.uint8)
    for threshold in [*np.linspace(0, 1, 101).round(2), 0.123456, 128 / 255]:
        expected = [int(s) > 255 * float(threshold) for s in stored]
        assert mask_of_scores(stored, float(threshold)).tolist() == expected
    floats = np.array([0.1, 0.3, np.float32(0.3), 0.7], np.float32)
    assert mask_of_scores(floats, 0.3).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("connectivity", [1, 2])
@pytest.mark.parametrize("threshold", [0.2, 0.45])
def test_objects_in_view_are_counted(scored, scores, threshold, connectivity):
    seen = View(t=0, z=4, y=(-20.0, 60.4), x=(10.2, 500.0), pixel=0.3)
    plane = scores[4, :61, 10:] > 255 * threshold
    found = count_in_view(scored, seen, threshold, connectivity)
    assert found.n_objects == label(plane, connectivity=connectivity).max() > 1
    assert found.level == 0


def test_what_a_small_picture_shows_is_counted_at_its_level(scored, scores, monkeypatch):
    seen = View(t=0, z=4, y=(0, 120), x=(0, 90), pixel=2.5)
    plane = halved(scores)[4] > 255 * 0.3
    found = count_in_view(scored, seen, 0.3, 1)
    assert (found.n_objects, found.level) == (label(plane, connectivity=1).max(), 1)
    nothing = View(t=0, z=4, y=(-50, -1), x=(0, 90), pixel=1)
    assert count_in_view(scored, nothing, 0.3, 1).n_objects == 0
    monkeypatch.setattr("megaseg_dask.tools.view.threshold._MAX_SEEN_VOXELS", 1000)
    assert count_in_view(scored, seen, 0.3, 1).n_objects is None


# -- contrast


def test_what_is_empty_does_not_set_the_contrast(tmp_path):
    bright = blobs((8, 40, 40), seed=7) + 1000
    padded = np.zeros((8, 600, 700), np.uint16)
    padded[:, 100:140, 100:140] = bright
    path = write_image(tmp_path / "a.zarr", padded)
    (layer,) = Gallery(str(path)).scene("").layers
    low, high = layer.limits
    assert low == pytest.approx(np.percentile(bright, 1), rel=0.02)
    assert high == pytest.approx(np.percentile(bright, 99.8), rel=0.02)


def test_a_first_timepoint_that_is_empty_does_not_either(tmp_path):
    later = blobs((8, 40, 40), seed=7) + 500
    path = write_image(tmp_path / "a.zarr", np.stack([0 * later, later]), axes="tzyx")
    layer = Gallery(str(path)).scene("").layers[0]
    assert layer.limits[0] >= 500
    empty = write_image(tmp_path / "b.zarr", 0 * later)
    image = Gallery(str(empty)).scene("").layers[0].image
    assert find_limits(Location.of(empty), image, 0) == (0.0, 1.0)


# -- runs


@pytest.fixture
def run(tmp_path, tiny_bundle, cheap_engine):
    """Return a function that segments an image with options, or only plans it."""
    source = write_image(tmp_path / "image.zarr", blobs((16, 32, 48)), scale=SCALE)

    def start(name, record=segment_here, **options):
        target = str(tmp_path / name)
        settings = parse_settings({**OPTIONS, "model": str(tiny_bundle), **options})
        record(str(source), target, settings)
        return target

    return start


def test_scores_have_the_threshold_of_their_run_and_a_command(run):
    target = run("a b.zarr", threshold="0.4", connectivity=2)
    gallery = Gallery(target)
    _, labels, scores = gallery.scene("").layers
    assert (scores.kind, scores.threshold, scores.connectivity) == (SCORES, 0.4, 2)
    assert gallery.command("") == f"megaseg relabel '{target}'"
    assert gallery.notice() == ""
    state = state_of(gallery.scene(""), Urls())
    # Labels lie above scores, and both above the image.
    assert [layer["name"] for layer in state["layers"]][:4] == ["backdrop", "0", "2", "1"]
    session = Session(gallery, Urls())
    seen = {"first": {"x": 0, "y": 0}, "last": {"x": 48, "y": 32}, "position": {"z": 7}}
    asked = {"field": "", "layer": 2, "pixel": 0.5, "threshold": 0.4, **seen}
    (plane,) = Volume.of(labels.location, labels.image).read(Box((7, 0, 0), (8, 32, 48)))
    assert session.count(asked)["n_objects"] == label(plane > 0, connectivity=2).max()
    with pytest.raises(SettingsError, match="no layer of scores"):
        session.count({**asked, "layer": 1})


def test_a_run_that_is_not_finished_is_named_and_sets_the_exit_code(run, monkeypatch):
    target = run("later.zarr", record=record_plans)
    gallery = Gallery(target)
    # The image is shown while there is nothing else.
    assert [layer.name for layer in gallery.scene("").layers] == ["image"]
    assert "The run megaseg is not finished: 0 of 1 tasks are done" in gallery.notice()
    monkeypatch.setattr("megaseg_dask.tools.view.viewer.serve", stopped)
    assert view(target, None, print) == 3


async def stopped(*_, **__):
    """Serve nothing: somebody pressed Ctrl-C."""
    raise KeyboardInterrupt

"""`megaseg train` up to where cyto-dl begins: manifests, splits, environments, folders."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from tifffile import imread, imwrite

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.cli.app import main
from megaseg_dask.errors import (
    BundleError,
    MegasegError,
    SettingsError,
    SourceError,
    StoreError,
    TargetError,
)
from megaseg_dask.tools.training import Request, checks, environment, train
from megaseg_dask.tools.training.dataset import digest_of, write_dataset
from megaseg_dask.tools.training.examples import Example, Tiff, common_size_um
from megaseg_dask.tools.training.manifest import read_examples
from megaseg_dask.tools.training.splits import split_examples
from tests.fixtures.bundles import TINY, write_checkpoint
from tests.fixtures.images import blobs, write_image

PATCH = (16, 32, 32)
SHAPE = (20, 40, 44)


def write_pair(
    folder: Path, name: str, shape=SHAPE, axes: str = "ZYX"
) -> tuple[np.ndarray, np.ndarray]:
    image = blobs(shape, seed=sum(map(ord, name)))
    labels = (image > 1300).astype(np.uint16) * 9
    for kind, values in (("raw", image), ("seg", labels)):
        imwrite(folder / f"{name}_{kind}.ome.tif", values, ome=True, metadata={"axes": axes})
    return image, labels


def test_the_size_of_voxels_is_read_from_tiff_images_that_state_it(tmp_path):
    image, _ = write_pair(tmp_path, "a")
    size = {"PhysicalSizeZ": 0.3, "PhysicalSizeY": 0.1, "PhysicalSizeX": 110}
    metadata = {"axes": "ZYX", **size, "PhysicalSizeXUnit": "nm"}
    for name, options in {
        "b": {"ome": True, "metadata": metadata},
        "c": {"metadata": None},
    }.items():
        imwrite(tmp_path / f"{name}_raw.tif", image, photometric="minisblack", **options)
    rows = [f"{name}_raw.tif,a_seg.ome.tif" for name in "bc"]
    examples = read_examples(write_manifest(tmp_path, "raw,seg", *rows), None, None)
    assert [example.spacing_um for example in examples] == [pytest.approx((0.3, 0.1, 0.11)), None]
    assert common_size_um(examples[:1]) == pytest.approx((0.3, 0.1, 0.11))


def write_manifest(folder: Path, *lines: str) -> str:
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "images.csv")


def write_labelled(
    path: Path, shape=SHAPE, axes: str = "zyx", names=("cells",), version: str = "0.5"
) -> Path:
    image = blobs(shape)
    write_image(path, image, axes=axes, version=version)
    labels = image if "c" not in axes else image.take(0, axes.index("c"))
    for name in names:
        write_image(
            path / "labels" / name,
            (labels > 1300).astype(np.uint32),
            axes=axes.replace("c", ""),
            version=version,
        )
    group = zarr.open_group(path / "labels", mode="a", zarr_format=3 if version == "0.5" else 2)
    listed = {"labels": list(names)}
    group.attrs.update({"ome": {"version": "0.5", **listed}} if version == "0.5" else listed)
    return path


def rows_of(folder: Path, split: str) -> list[dict]:
    with (folder / f"{split}.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_csv_becomes_images_and_masks_of_one_channel(tmp_path):
    image, labels = write_pair(tmp_path, "a")
    many, of_many = write_pair(tmp_path, "b", (2, *SHAPE), "CZYX")
    others, _ = write_pair(tmp_path, "d", (2, *SHAPE), "CZYX")
    imwrite(tmp_path / "b_seg.ome.tif", of_many[1], ome=True, metadata={"axes": "ZYX"})
    imwrite(tmp_path / "c_raw.tif", image)  # no axes at all
    manifest = write_manifest(
        tmp_path,
        "raw,seg,split",
        "b_raw.ome.tif,b_seg.ome.tif,train",
        "d_raw.ome.tif,a_seg.ome.tif,VALID",
        "gone.tif,gone.tif,test",
    )
    examples = split_examples(read_examples(manifest, "1", None), 0.5, PATCH)
    assert write_dataset(examples, tmp_path / "data") == {"train": 1, "val": 1}
    for split, raw, truth in (("train", many, of_many[1]), ("val", others, labels)):
        (row,) = rows_of(tmp_path / "data", split)
        np.testing.assert_array_equal(imread(row["raw"]), raw[1])
        np.testing.assert_array_equal(imread(row["seg1"]), truth > 0)
    manifest = write_manifest(
        tmp_path, "raw,seg", "c_raw.tif,a_seg.ome.tif", "a_raw.ome.tif,a_seg.ome.tif"
    )
    for example in read_examples(manifest, None, None):
        np.testing.assert_array_equal(example.image.read(example.box), image)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_omezarr_becomes_one_pair_a_timepoint(version, tmp_path):
    source = write_labelled(tmp_path / "image.zarr", (3, 2, *SHAPE), "tczyx", version=version)
    examples = split_examples(read_examples(str(source), "1", None), 0.3, PATCH)
    assert [one.split for one in examples] == ["train", "train", "val"]
    assert write_dataset(examples, tmp_path / "data") == {"train": 2, "val": 1}
    (row,) = rows_of(tmp_path / "data", "val")
    np.testing.assert_array_equal(imread(row["raw"]), blobs((3, 2, *SHAPE))[2, 1])


def test_a_plate_gives_its_labelled_fields(tmp_path):
    plate = zarr.open_group(tmp_path / "plate.zarr", mode="w")
    fields = {"A/1": ["0", "1"], "B/2": ["0"]}
    wells = [{"path": well, "rowIndex": i, "columnIndex": i} for i, well in enumerate(fields)]
    plate.attrs["ome"] = {
        "version": "0.5",
        "plate": {
            "name": "p",
            "rows": [{"name": "A"}, {"name": "B"}],
            "columns": [{"name": "1"}, {"name": "2"}],
            "wells": wells,
        },
    }
    for well, images in fields.items():
        group = plate.create_group(well)
        group.attrs["ome"] = {
            "version": "0.5",
            "well": {"images": [{"path": path} for path in images]},
        }
    for field in ("A/1/0", "B/2/0"):
        write_labelled(tmp_path / "plate.zarr" / field)
    write_image(tmp_path / "plate.zarr/A/1/1", blobs(SHAPE))
    examples = split_examples(read_examples(str(tmp_path / "plate.zarr"), None, None), 0.5, PATCH)
    assert {one.name for one in examples} == {"A/1/0", "B/2/0"}
    assert {one.split for one in examples} == {"train", "val"}


def test_an_empty_label_image_is_left_out(tmp_path):
    source = write_labelled(tmp_path / "image.zarr", (3, *SHAPE), "tzyx")
    labels = zarr.open_array(source / "labels/cells/0", mode="a")
    labels[0] = 0
    examples = split_examples(read_examples(str(source), None, None), 0.3, PATCH)
    assert write_dataset(examples, tmp_path / "data") == {"train": 1, "val": 1}
    labels[2] = 0
    with pytest.raises(SourceError, match="labels of every image for val are empty"):
        write_dataset(examples, tmp_path / "again")


def test_an_empty_mask_that_is_listed_teaches_that_nothing_is_there(tmp_path):
    for name in ("full", "empty", "other"):
        write_pair(tmp_path, name)
    for number, name in enumerate(("empty", "other")):
        image = imread(tmp_path / f"{name}_raw.ome.tif") + np.uint16(number + 1)
        imwrite(tmp_path / f"{name}_raw.ome.tif", image, ome=True, metadata={"axes": "ZYX"})
    nothing = np.zeros_like(imread(tmp_path / "empty_seg.ome.tif"))
    imwrite(tmp_path / "empty_seg.ome.tif", nothing, ome=True, metadata={"axes": "ZYX"})
    manifest = write_manifest(
        tmp_path,
        "raw,seg,split",
        "full_raw.ome.tif,full_seg.ome.tif,train",
        "empty_raw.ome.tif,empty_seg.ome.tif,train",
        "other_raw.ome.tif,other_seg.ome.tif,val",
    )
    examples = split_examples(read_examples(manifest, None, None), 0.5, PATCH)
    for _ in range(2):
        assert write_dataset(examples, tmp_path / "data") == {"train": 2, "val": 1}
        masks = [imread(row["seg1"]) for row in rows_of(tmp_path / "data", "train")]
        assert [mask.any() for mask in masks] == [True, False]


shapes = st.tuples(*[st.integers(8, 300)] * 3)


def example(name: str, shape=SHAPE, group: str | None = None) -> Example:
    file = Tiff(name, "ZYX", channel=0, n_bytes=1, modified_ns=1)
    return Example(name, group or name, file, file, Box.of(shape))


@given(shapes, st.floats(0.05, 0.9))
def test_a_single_volume_is_cut_without_overlap_into_parts_that_hold_a_patch(shape, fraction):
    fits = any(n >= 2 * p for n, p in zip(shape, PATCH, strict=True)) and all(
        n >= p for n, p in zip(shape, PATCH, strict=True)
    )
    if not fits:
        with pytest.raises(SourceError):
            split_examples([example("a", shape)], fraction, PATCH)
        return
    before, after = split_examples([example("a", shape)], fraction, PATCH)
    assert (before.split, after.split) == ("train", "val")
    assert before.box.size + after.box.size == Box.of(shape).size
    assert (before.box & after.box).size == 0
    for one in (before, after):
        assert all(n >= p for n, p in zip(one.box.shape, PATCH, strict=True))


@given(st.integers(2, 40), st.integers(1, 3), st.floats(0.01, 0.99))
def test_a_group_is_never_in_both_splits(n_groups, n_times, fraction):
    examples = [example(f"{g}/{t}", group=str(g)) for g in range(n_groups) for t in range(n_times)]
    found = split_examples(examples, fraction, PATCH)
    split = {(one.group, one.split) for one in found}
    assert len(split) == n_groups
    assert {name for _, name in split} == {"train", "val"}
    assert {(one.name, one.split) for one in split_examples(examples[::-1], fraction, PATCH)} == {
        (one.name, one.split) for one in found
    }


BAD = {
    "no such file": ("gone.csv", [], "No such file or directory; expected columns raw and seg"),
    "no rows": ("images.csv", ["raw,seg"], "lists no image"),
    "no column of images": ("images.csv", ["picture,seg", "a,b"], "one must be called raw"),
    "no labels": (
        "images.csv",
        ["raw,seg", "a_raw.ome.tif,"],
        "line 2: an image or its labels are missing",
    ),
    "an image that is not there": (
        "images.csv",
        ["raw,seg", "b_raw.ome.tif,a_seg.ome.tif"],
        "line 2: .*b_raw",
    ),
    "no TIFF": ("images.csv", ["raw,seg", "no.tif,a_seg.ome.tif"], "cannot be read as TIFF"),
    "another shape": (
        "images.csv",
        ["raw,seg", "a_raw.ome.tif,s_seg.ome.tif"],
        r"\(20, 40, 44\), its labels \(16,",
    ),
    "an unknown split": (
        "images.csv",
        ["raw,seg,split", "a_raw.ome.tif,a_seg.ome.tif,often"],
        "split 'often'",
    ),
    "nothing to validate": (
        "images.csv",
        ["raw,seg,split", "a_raw.ome.tif,a_seg.ome.tif,train"],
        "for val",
    ),
    "half a split": (
        "images.csv",
        ["raw,seg,split", "a_raw.ome.tif,a_seg.ome.tif,train", "a_raw.ome.tif,a_seg.ome.tif,"],
        "line 3 has no split",
    ),
    "a small image": (
        "images.csv",
        ["raw,seg,split", "s_raw.ome.tif,s_seg.ome.tif,train", "a_raw.ome.tif,a_seg.ome.tif,val"],
        r"images.csv line 2 is of \(16.*smaller than a patch",
    ),
    "several channels": (
        "images.csv",
        ["raw,seg", "c_raw.ome.tif,a_seg.ome.tif"],
        "choose one with --channel",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_manifest_is_one_line_and_nothing_is_written(name, tmp_path):
    file, lines, message = BAD[name]
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "s", (16, 30, 30))
    write_pair(tmp_path, "c", (2, *SHAPE), "CZYX")
    (tmp_path / "no.tif").write_text("no image")
    if lines:
        write_manifest(tmp_path, *lines)
    request = Request(str(tmp_path / file), "MegaSeg_light", str(tmp_path / "out"), patch=PATCH)
    with pytest.raises(SourceError, match=message):
        train(request, print)
    assert not (tmp_path / "out").exists()


def write_tiff(path: Path, values: np.ndarray) -> None:
    imwrite(path, values, ome=True, metadata={"axes": "ZYX"})


IMAGE = blobs(SHAPE)
MASK = IMAGE > 1300
LYING_LABELS = {
    "probabilities": (MASK * np.float32(0.7), "hold 0.7, as probabilities or intensities do"),
    "1 for background, 255 for objects": (
        np.where(MASK, 255, 1).astype(np.uint8),
        "no background, the smallest value is 1",
    ),
    "the image": (IMAGE, "look like intensities"),
    "an image with empty background": (np.where(MASK, IMAGE, 0), "look like intensities"),
    "not annotated": (np.where(MASK, 3, -1).astype(np.int16), "hold -1"),
}


@pytest.mark.parametrize("name", LYING_LABELS)
def test_labels_that_are_none_are_named_before_a_training_begins(name, tmp_path, somewhere):
    labels, message = LYING_LABELS[name]
    write_pair(tmp_path, "a")
    write_tiff(tmp_path / "b_raw.ome.tif", IMAGE[::-1])
    write_tiff(tmp_path / "b_seg.ome.tif", labels)
    manifest = write_manifest(
        tmp_path,
        "raw,seg,split",
        "a_raw.ome.tif,a_seg.ome.tif,train",
        "b_raw.ome.tif,b_seg.ome.tif,val",
    )
    lying = Request(manifest, "MegaSeg_light", str(tmp_path / "out"), patch=PATCH)
    with pytest.raises(SourceError, match=f"line 3: its labels.*{message}"):
        train(lying, print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", [1, 255])
def test_masks_of_any_value_and_type_are_taken(inside, tmp_path):
    for dtype in (np.uint8, np.uint16, np.float32):
        checks.require_labels("a mask", (MASK * inside).astype(dtype))
    checks.require_labels("a mask", MASK)
    checks.require_labels("noise", np.random.default_rng(0).integers(0, 2, SHAPE))


def test_a_mask_given_as_an_image_is_named(tmp_path, somewhere):
    write_pair(tmp_path, "a")
    write_tiff(tmp_path / "b_raw.ome.tif", np.where(MASK, 255, 1).astype(np.uint8))
    write_tiff(tmp_path / "b_seg.ome.tif", MASK.astype(np.uint8))
    manifest = write_manifest(
        tmp_path,
        "raw,seg,split",
        "a_raw.ome.tif,a_seg.ome.tif,train",
        "b_raw.ome.tif,b_seg.ome.tif,val",
    )
    lying = Request(manifest, "MegaSeg_light", str(tmp_path / "out"), patch=PATCH)
    with pytest.raises(SourceError, match="line 3: the image has one value in its objects, 255"):
        train(lying, print)


@pytest.mark.parametrize("copied", [False, True])
def test_an_image_in_both_splits_is_named(copied, tmp_path, somewhere):
    write_pair(tmp_path, "a")
    second = "a"
    if copied:
        for kind in ("raw", "seg"):
            shutil.copy(tmp_path / f"a_{kind}.ome.tif", tmp_path / f"b_{kind}.ome.tif")
        second = "b"
    manifest = write_manifest(
        tmp_path,
        "raw,seg,split",
        "a_raw.ome.tif,a_seg.ome.tif,train",
        f"{second}_raw.ome.tif,{second}_seg.ome.tif,val",
    )
    leaking = Request(manifest, "MegaSeg_light", str(tmp_path / "out"), patch=PATCH)
    with pytest.raises(SourceError, match=r"line 2 and .*line 3 are the same image"):
        train(leaking, print)
    assert not (tmp_path / "out").exists()


def test_a_file_that_changed_is_another_example(tmp_path):
    write_pair(tmp_path, "a")
    manifest = write_manifest(tmp_path, "raw,seg", "a_raw.ome.tif,a_seg.ome.tif")
    before = digest_of(read_examples(manifest, None, None))
    assert digest_of(read_examples(manifest, None, None)) == before
    write_tiff(tmp_path / "a_seg.ome.tif", np.ones(SHAPE, np.uint16))
    assert digest_of(read_examples(manifest, None, None)) != before


def test_an_omezarr_without_labels_is_refused(tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    with pytest.raises(SourceError, match="no label images"):
        read_examples(str(source), None, None)
    source = write_labelled(tmp_path / "two.zarr", names=("cells", "nuclei"))
    with pytest.raises(SettingsError, match="choose one with --label"):
        read_examples(str(source), None, None)
    with pytest.raises(SettingsError, match="has cells, nuclei"):
        read_examples(str(source), None, "mitochondria")
    assert len(read_examples(str(source), None, "nuclei")) == 1


def request(tmp_path: Path, **options) -> Request:
    source = tmp_path / "image.zarr"
    if not source.exists():
        write_labelled(source, (20, 40, 100))
    return Request(
        str(source), "MegaSeg_light", str(tmp_path / "out"), **{"patch": PATCH, **options}
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patch": (16, 30, 32)}, SettingsError, "multiples of 16"),
        ({"start": "no such model"}, MegasegError, "--from no such model: neither a known model"),
        ({"channel": "3"}, SettingsError, "has no such channel"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(
    options, error, message, tmp_path
):
    with pytest.raises(error, match=message):
        train(request(tmp_path, **options), print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("network", "heads", "message"),
    [
        ({"in_channels": 2}, None, "only a network with one input channel and one"),
        ({"out_channels": 2}, None, "only a network with one input channel and one"),
        ({}, {"seg": (1, 1)}, "cannot train a head with its own layers"),
    ],
)
def test_other_bundles_are_not_trained_on(network, heads, message, tmp_path):
    start = write_checkpoint(tmp_path / "a.ckpt", replace(TINY, **network), heads=heads)
    with pytest.raises(BundleError, match=message):
        train(request(tmp_path, start=str(start)), print)
    assert not (tmp_path / "out").exists()


def test_without_cytodl_the_error_is_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.HOME, str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="megaseg train --install"):
        train(request(tmp_path), print)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_installation_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.HOME, str(tmp_path))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    with pytest.raises(SettingsError, match="does not have it"):
        environment.find_python()


def test_cytodl_needs_python_311(monkeypatch):
    monkeypatch.setattr(sys, "version_info", type("V", (), {"major": 3, "minor": 12})())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SettingsError, match=r"needs Python 3\.11, this is 3\.12"):
        environment.find_base_python()


def test_an_installation_that_fails_names_the_cause(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.HOME, str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="was not installed"):
        environment.install(lambda line: None)


@pytest.fixture
def somewhere(tmp_path, monkeypatch) -> Path:
    """An environment that claims to have cyto-dl; nothing of it is run."""
    folder = tmp_path / "environment"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").touch()
    (folder / environment.MARK).touch()
    monkeypatch.setenv(environment.HOME, str(folder))
    return folder


def test_a_folder_of_something_else_is_left_alone(tmp_path, somewhere):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(TargetError, match="contains other files than a training"):
            train(request(tmp_path, overwrite=overwrite), print)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_another_training_is_left_alone(tmp_path, somewhere):
    work = tmp_path / "out/training"
    work.mkdir(parents=True)
    (work / "request.json").write_text(json.dumps({"recipe": {}, "from": None, "examples": ""}))
    with pytest.raises(TargetError, match="--overwrite"):
        train(request(tmp_path), print)
    assert [path.name for path in work.iterdir()] == ["request.json"]


def test_fewer_epochs_than_are_trained_change_nothing(tmp_path, somewhere):
    work = tmp_path / "out/training"
    with pytest.raises(StoreError, match="Permission denied"):
        train(request(tmp_path), print)
    rows = [f"{epoch},1,1,0.1,{epoch}" for epoch in range(9)]
    (work / "metrics.csv").write_text(
        "\n".join(["epoch,training_loss,validation_loss,learning_rate,elapsed_s", *rows])
    )
    before = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    with pytest.raises(SettingsError, match="--max-epochs 8: 9 epochs are trained already"):
        train(request(tmp_path, max_epochs=8), print)
    assert {path.name: path.stat().st_mtime_ns for path in work.iterdir()} == before


def test_a_training_that_is_refused_leaves_no_folder(tmp_path, somewhere):
    for split in ("train", "val"):
        write_pair(tmp_path, split, (20, 40, 100))
        imwrite(
            tmp_path / f"{split}_seg.ome.tif",
            np.zeros((20, 40, 100), np.uint8),
            metadata={"axes": "ZYX"},
        )
    rows = [f"{split}_raw.ome.tif,{split}_seg.ome.tif,{split}" for split in ("train", "val")]
    manifest = write_manifest(tmp_path, "raw, seg, split", *rows)
    with pytest.raises(SourceError, match="the labels of every image for train are empty"):
        train(replace(request(tmp_path), manifest=manifest), print)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, somewhere):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="out cannot be written: Not a directory"):
        train(replace(request(tmp_path), out=str(tmp_path / "file/out")), print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a MANIFEST"),
        (["images.csv"], "--out DIR"),
        (["images.csv", "--out", "x", "--recipe", "MegaSeg_v2"], "MegaSeg_v1, MegaSeg_light"),
        (["images.csv", "--out", "x", "--patch", "16,32"], "three"),
        (["images.csv", "--out", "x", "--max-time", "8h"], "HH:MM:SS"),
        (["images.csv", "--out", "x", "--validation", "1"], "between 0 and 1"),
        (["images.csv", "--out", "x", "--learning-rate", "nan"], "positive"),
        (["images.csv", "--out", "x", "--decay", "0"], "above 0 and up to 1"),
        (["images.csv", "--out", "x", "--decay", "1.01"], "above 0 and up to 1"),
        (["images.csv", "--out", "x", "--decay", "nan"], "above 0 and up to 1"),
        (["images.csv", "--out", "x", "--accelerator", "tpu"], "auto, cpu, gpu, mps"),
        (["images.csv", "--out", "x", "--max-epochs", "0"], "--max-epochs"),
        (["gone.zarr", "--out", "x"], "does not exist"),
    ],
)
def test_a_wrong_request_is_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        main(["train", *options])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())

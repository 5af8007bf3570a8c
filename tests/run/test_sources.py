"""Sources that are no images to segment: each is named, with the next step."""

import json
import os
import re
import shutil
import socket
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from megaseg_dask.errors import MegasegError, SourceError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location, clear_array_cache
from megaseg_dask.tools.view.gallery import Gallery
from megaseg_dask.tools.view.neuroglancer_state import state_of
from megaseg_dask.tools.view.page import axes_of
from tests.fixtures.images import blobs, write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here
from tests.tools.test_view import Urls

SHAPE = (16, 32, 32)


@pytest.fixture
def run(tmp_path, tiny_bundle):
    def call(source, target, **options):
        settings = parse_settings({"model": str(tiny_bundle), "threads": 1, **options})
        return segment_here(str(source), str(target), settings)

    return call


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what we wrote ourselves


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_and_scores_of_ours_are_no_sources(version, run, tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), version=version)
    assert run(source, tmp_path / "out.zarr", ome_zarr=version).status == "done"
    assert run(source, source, outputs="labels").status == "done"
    before = files_of(tmp_path)
    for path, words in {
        "out.zarr": "holds scores that megaseg wrote; give the image that they were computed",
        "out.zarr/labels/megaseg": "is a label image; give the image that it belongs to",
        "image.zarr/labels/megaseg": "is a label image",
    }.items():
        with pytest.raises(SourceError, match=words):
            run(tmp_path / path, tmp_path / "again.zarr")
    assert files_of(tmp_path) == before
    # The image itself is one, with labels in it too.
    assert run(source, tmp_path / "again.zarr").status == "done"


def test_a_plate_of_scores_is_no_source_either(run, tmp_path):
    source = write_fields(tmp_path / "plate.zarr", "0.5", {"A/1/0": FieldSpec(("dna",))})
    assert run(source, tmp_path / "out.zarr").status == "done"
    with pytest.raises(SourceError, match="A/1/0 holds scores"):
        run(tmp_path / "out.zarr", tmp_path / "again.zarr")


# -- metadata of one version in the Zarr format of another


@pytest.mark.filterwarnings("ignore:Both zarr.json")
@pytest.mark.parametrize("leaves_v2", [False, True], ids=["v3 alone", "beside v2"])
def test_metadata_of_0_4_in_zarr_v3_are_read_but_not_added_to(leaves_v2, run, tmp_path):
    """`zarr migrate` makes them: the metadata of OME-Zarr 0.4 stay as they are."""
    data = blobs(SHAPE)
    old = write_image(tmp_path / "old.zarr", data, version="0.4")
    attributes = zarr.open_group(old, mode="r").attrs.asdict()
    source = write_image(tmp_path / "image.zarr", data)
    zarr.open_group(source, mode="r+").attrs.put(attributes)
    if leaves_v2:
        for name in (".zgroup", ".zattrs"):
            shutil.copy(old / name, source / name)
    before = files_of(source)
    with pytest.raises(
        SourceError,
        match=r"OME-Zarr 0\.4 metadata in Zarr v3.*choose a TARGET that is not the source",
    ):
        run(source, source, outputs="labels")
    assert files_of(source) == before
    assert run(source, tmp_path / "out.zarr").status == "done"


# -- other formats


def n5(folder: Path) -> None:
    (folder / "attributes.json").write_text('{"n5": "2.0.0"}')


def n5_array(folder: Path) -> None:
    form = {"dimensions": [8, 8, 8], "dataType": "uint16", "blockSize": [8, 8, 8]}
    (folder / "attributes.json").write_text(json.dumps(form))


def precomputed(folder: Path) -> None:
    info = {"@type": "neuroglancer_multiscale_volume", "scales": [{"key": "8_8_8"}]}
    (folder / "info").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("make", "kind"),
    [(n5, "an N5 container"), (n5_array, "an N5 container"), (precomputed, "a precomputed volume")],
)
def test_other_formats_of_chunks_are_named_with_the_next_step(make, kind, run, tmp_path):
    source = tmp_path / "data"
    source.mkdir()
    make(source)
    with pytest.raises(
        SourceError, match=rf"{kind}.* \(convert it to OME-Zarr, for example with tensorstore"
    ):
        run(source, tmp_path / "out.zarr")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_unknown_codec_is_named_with_the_next_step(version, run, tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), version=version)
    file = source / "0" / ("zarr.json" if version == "0.5" else ".zarray")
    document = json.loads(file.read_text())
    if version == "0.5":
        document["codecs"] = [*document["codecs"][:1], {"name": "secret", "configuration": {}}]
    else:
        document["compressor"] = {"id": "secret"}
    file.write_text(json.dumps(document))
    with pytest.raises(SourceError, match=r"secret.*install the package of the codec") as caught:
        run(source, tmp_path / "out.zarr")
    assert str(source / "0") in str(caught.value)


# -- addresses


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r"), min_size=1, max_size=12))
def test_a_file_address_is_the_path_that_it_encodes(name):
    if name in (".", ".."):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a {name}.zarr"
        for uri in (path.as_uri(), path.as_uri().replace("file:///", "file://localhost/")):
            assert Location.of(uri) == Location.of(path)


# -- the viewer


def test_a_scale_of_zero_is_shown(tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), scale={"z": 0.0, "y": 0.5, "x": -1})
    scene = Gallery(str(source)).scene("")
    assert [scale for scale, _ in scene.dimensions.values()] == [1e-6, 0.5e-6, 1e-6]
    assert set(scene.origin.values()) == {0.0}
    assert state_of(scene, Urls())["dimensions"].keys() == set("xyz")
    assert [axis.scale for axis in axes_of(scene)] == [1e-6, 0.5e-6, 1e-6]


# -- what leads elsewhere, and what is no file


def chunk_of(source: Path) -> Path:
    """The only chunk of an image."""
    [chunk] = [path for path in (source / "0").rglob("*") if path.is_file() and path.name == "0"]
    return chunk


def pipe(chunk: Path) -> None:
    os.mkfifo(chunk)


def device(chunk: Path) -> None:
    # A link to it: only root may make one.
    chunk.symlink_to("/dev/zero")


def outside(chunk: Path) -> None:
    other = chunk.parents[4] / "secret"
    other.write_bytes(b"secret" * 100)
    chunk.symlink_to(other)


def outside_by_folder(chunk: Path) -> None:
    other = chunk.parents[4] / "elsewhere"
    other.mkdir()
    (other / chunk.name).write_bytes(b"secret" * 100)
    chunk.parent.rmdir()
    chunk.parent.symlink_to(other)


def listening(chunk: Path) -> None:
    # Its address may only be short.
    before = Path.cwd()
    os.chdir(chunk.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(chunk.name)
    os.chdir(before)


ELSEWHERE = {
    "a pipe": (pipe, "not a regular file but a pipe"),
    "a device": (device, "not a regular file but a device"),
    "a socket": (listening, "not a regular file but a socket"),
    "a link": (outside, "a link to .*secret outside the image"),
    "a link of a folder": (outside_by_folder, "a link to .*elsewhere/0 outside the image"),
}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_only_regular_files_of_the_array_are_read_as_chunks(name, version, run, tmp_path):
    make, words = ELSEWHERE[name]
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), version=version, chunks=SHAPE)
    chunk = chunk_of(source)
    chunk.unlink()
    make(chunk)
    clear_array_cache()
    done = []
    # In a thread: if a pipe were read, no one would write to it.
    thread = threading.Thread(
        target=lambda: done.append(run(source, tmp_path / "out.zarr")), daemon=True
    )
    thread.start()
    thread.join(timeout=120)
    assert done, "it is still reading"
    [failure] = done[0].failures
    assert re.search(words, failure.error), failure.error
    assert str(chunk) in failure.error


def test_links_within_an_array_and_to_a_whole_array_are_followed(run, tmp_path):
    data = blobs((16, 32, 64))
    data[:, :, 32:] = data[:, :, :32]
    source = write_image(tmp_path / "image.zarr", data, chunks=SHAPE)
    second = source / "0/c/0/0/1"
    second.unlink()
    second.symlink_to("0")
    shutil.move(source / "0", tmp_path / "moved")
    (source / "0").symlink_to(tmp_path / "moved")
    (tmp_path / "link.zarr").symlink_to(source)
    result = run(tmp_path / "link.zarr", tmp_path / "out.zarr")
    assert result.status == "done", result.failures


@pytest.mark.parametrize("name", ["zarr.json", "0/zarr.json"])
@pytest.mark.parametrize("make", [pipe, device], ids=["a pipe", "a device"])
def test_metadata_that_are_no_file_are_refused(make, name, run, tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    (source / name).unlink()
    make(source / name)
    with pytest.raises(MegasegError, match="not a regular file"):
        run(source, tmp_path / "out.zarr")


@pytest.mark.parametrize(
    "path", ["../other", "/etc", "..", "a/../../b", "", ".", "0/..", "/", "//etc"]
)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_levels_that_lead_out_of_an_image_are_not_followed(path, version, run, tmp_path):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), version=version)
    write_image(tmp_path / "other", blobs(SHAPE), version=version)
    group = zarr.open_group(source, mode="r+")
    attributes = group.attrs.asdict()
    entry = attributes.get("ome", attributes)["multiscales"][0]
    entry["datasets"][0]["path"] = path
    group.attrs.put(attributes)
    with pytest.raises(SourceError, match="is outside the image"):
        run(source, tmp_path / "out.zarr")


@pytest.mark.parametrize("name", ["../../secret", "/etc", "..", "a/../../../secret"])
def test_labels_that_lead_out_of_an_image_are_not_followed(name, tmp_path):
    from megaseg_dask import open_image

    source = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    write_image(tmp_path / "secret", np.full(SHAPE, 7, "uint16"))
    labels = zarr.open_group(source / "labels", mode="w", zarr_format=3)
    labels.attrs.put({"ome": {"version": "0.5", "labels": [name]}})
    with pytest.raises(SourceError):
        open_image(source)
    scene = Gallery(str(source)).scene("")
    assert [layer.kind for layer in scene.layers] == ["image"]

"""Images as they are found in the wild, read; what is no image, named; damaged chunks, named."""

import json
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from megaseg_dask.algorithms.chunking import write_layout
from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.errors import DataError, SourceError, StoreError
from megaseg_dask.ngff.group import write_group
from megaseg_dask.ngff.image import image_attributes, read_image, require_valid
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.ngff.volume import Volume, create_array
from megaseg_dask.stores import Location, clear_array_cache
from tests.fixtures.images import blobs, write_image

SHAPE = (9, 20, 17)
V2 = {"version": "0.4"}
BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}


@pytest.fixture(autouse=True)
def _fresh_cache():
    clear_array_cache()


def volume_of(path: Path, level: int = 0, t: int = 0, c: int = 0) -> Volume:
    location = Location.of(path)
    return Volume.of(location, read_image(location), level=level, t=t, c=c)


def ome_of(path: Path) -> dict:
    attributes = zarr.open_group(path, mode="r").attrs.asdict()
    return attributes.get("ome", attributes)


def set_ome(path: Path, ome: dict) -> None:
    group = zarr.open_group(path, mode="r+")
    group.attrs.put({"ome": ome} if group.metadata.zarr_format == 3 else ome)


def edit(path: Path, change) -> Path:
    """Change the first multiscale of an image in place."""
    ome = ome_of(path)
    change(ome["multiscales"][0])
    set_ome(path, ome)
    return path


# -- every way of storing voxels


STORED = {
    "v3": {},
    "v3 dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "v3 with v2 keys": {"chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "v3 sharded": {"chunks": (2, 5, 4), "shards": (4, 10, 12)},
    "v3 one shard": {"chunks": (3, 7, 5), "shards": (9, 21, 20)},
    "v3 blosc": {"compressors": BloscCodec(cname="lz4")},
    "v3 gzip": {"compressors": GzipCodec()},
    "v3 raw, big-endian": {"compressors": None, "serializer": BytesCodec(endian="big")},
    "v3 crc32c": {"compressors": [ZstdCodec(), Crc32cCodec()]},
    "v3 transposed": {"filters": [zarr.codecs.TransposeCodec(order=(2, 0, 1))]},
    "v2": V2,
    "v2 dots": {**V2, "chunk_key_encoding": {"name": "v2", "separator": "."}},
    "v2 F order": {**V2, "order": "F"},
    "v2 blosc": {**V2, "compressors": BLOSC},
    "v2 gzip": {**V2, "compressors": {"id": "gzip", "level": 1}},
    "v2 zlib": {**V2, "compressors": {"id": "zlib", "level": 1}},
    "v2 zstd": {**V2, "compressors": {"id": "zstd", "level": 1}},
    "v2 raw": {**V2, "compressors": None},
    "planes": {"chunks": (1, 20, 17)},
    "one chunk": {"chunks": (100, 100, 100)},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_any_layout_reads_the_same_voxels(tmp_path, stored):
    data = blobs(SHAPE)
    path = write_image(tmp_path / "image.zarr", data, **{"chunks": (4, 7, 5), **stored})
    volume = volume_of(path)
    assert_array_equal(volume.read(Box.of(SHAPE)), data)
    for box in BlockGrid(SHAPE, (5, 9, 8)):
        assert_array_equal(volume.read(box), data[box.slices])


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    "dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "?"]
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_any_dtype_is_read_in_native_byte_order(tmp_path, version, dtype, order):
    data = blobs(SHAPE).astype(np.dtype(dtype).newbyteorder(order))
    path = write_image(tmp_path / "image.zarr", data, version=version)
    image, values = read_image(Location.of(path)), volume_of(path).read(Box.of(SHAPE))
    assert values.dtype.isnative
    assert values.dtype == np.dtype(image.dtype) == np.dtype(dtype)
    assert values.flags.c_contiguous
    assert_array_equal(values, data)


@pytest.mark.parametrize("axes", ["zyx", "xyz", "yzx", "tzyx", "cxzy", "tcyxz"])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_axes_go_by_name(tmp_path, axes, version):
    extents = dict(zip("tczyx", (2, 3, *SHAPE), strict=True))
    scales = dict(zip("tczyx", (5.0, 1.0, 0.3, 0.1, 0.2), strict=True))
    data = blobs(tuple(extents[a] for a in axes))
    path = write_image(tmp_path / "image.zarr", data, axes=axes, version=version, scale=scales)
    image = read_image(Location.of(path))
    assert "".join(image.axis_names) == axes
    assert image.volume_shape() == SHAPE
    assert_allclose(image.spacing_um, (0.3, 0.1, 0.2))
    assert (image.extent("t"), image.extent("c")) == tuple(
        extents[a] if a in axes else 1 for a in "tc"
    )
    box = Box((2, 3, 4), (9, 18, 11))
    for t in range(image.extent("t")):
        for c in range(image.extent("c")):
            single = data[tuple({"t": t, "c": c}.get(a, slice(None)) for a in axes)]
            order = [[a for a in axes if a in "zyx"].index(a) for a in "zyx"]
            assert_array_equal(
                volume_of(path, t=t, c=c).read(box), single.transpose(order)[box.slices]
            )


@pytest.mark.parametrize("fill", [0, 7, None])
@pytest.mark.parametrize(
    "options", [{}, V2, {"chunks": (2, 5, 4), "shards": (4, 10, 12)}], ids=["v3", "v2", "sharded"]
)
def test_an_absent_chunk_is_the_fill_value(tmp_path, fill, options):
    if fill is None and "version" not in options:
        pytest.skip("only Zarr v2 has arrays without a fill value")
    data = np.full(SHAPE, fill or 0, "uint16")
    data[:4, :10, :12] = blobs((4, 10, 12))
    path = write_image(
        tmp_path / "image.zarr", data, **{"chunks": (4, 10, 12), **options}, fill_value=fill
    )
    stored = [
        p for p in (path / "0").rglob("*") if p.is_file() and not p.name.startswith((".z", "zarr"))
    ]
    assert len(stored) == 1
    assert_array_equal(volume_of(path).read(Box.of(SHAPE)), data)


def test_floats_with_nan_as_fill_value(tmp_path):
    data = np.full(SHAPE, np.nan, "float32")
    options = {"chunks": (2, 5, 4), "shards": (4, 10, 12)}
    path = write_image(tmp_path / "image.zarr", data, fill_value=np.nan, **options)
    assert np.isnan(volume_of(path).read(Box.of(SHAPE))).all()


# -- metadata


def test_versions_without_their_key_follow_the_zarr_format(tmp_path):
    path = edit(
        write_image(tmp_path / "a.zarr", blobs(SHAPE), version="0.4"),
        lambda entry: entry.pop("version"),
    )
    assert read_image(Location.of(path)).version == "0.4"
    path = write_image(tmp_path / "b.zarr", blobs(SHAPE))
    set_ome(path, {"multiscales": ome_of(path)["multiscales"]})
    assert read_image(Location.of(path)).version == "0.5"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_transformations_of_dataset_and_image_are_composed(tmp_path, version):
    def change(entry):
        entry["datasets"][0]["coordinateTransformations"] = [
            {"type": "scale", "scale": [2.0, 0.5, 0.25]},
            {"type": "translation", "translation": [1.0, 2.0, 3.0]},
        ]
        entry["coordinateTransformations"] = [
            {"type": "scale", "scale": [10.0, 10.0, 4.0]},
            {"type": "translation", "translation": [0.0, 1.0, 0.0]},
        ]

    path = edit(write_image(tmp_path / "i", blobs(SHAPE), version=version), change)
    image = read_image(Location.of(path))
    assert image.transform() == ((20.0, 5.0, 1.0), (10.0, 21.0, 12.0))
    # Each is written again where it was read: some readers know those of datasets alone.
    written = tmp_path / "written"
    write_image(written, blobs(SHAPE), version=version)
    write_group(Location.of(written), version, image_attributes(image))
    assert read_image(Location.of(written)) == image


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_levels_stand_where_their_paths_say(tmp_path, version):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE), blobs((5, 10, 9)), version=version)
    zarr.open_group(path / "scale0", mode="w", zarr_format=2 if version == "0.4" else 3)
    (path / "0").rename(path / "scale0/image")
    (path / "1").rename(path / "half size")

    def change(entry):
        entry["datasets"][0]["path"] = "scale0/image"
        entry["datasets"][1]["path"] = "half size"

    image = read_image(Location.of(edit(path, change)))
    assert [level.path for level in image.levels] == ["scale0/image", "half size"]
    assert [level.shape for level in image.levels] == [SHAPE, (5, 10, 9)]
    assert_array_equal(volume_of(path, 1).read(Box.of((5, 10, 9))), blobs((5, 10, 9)))
    assert [level.path for level in image.with_pyramid().levels] == ["0", "1"]


@pytest.mark.parametrize(
    ("omero", "names"),
    [
        (None, ()),
        ({}, ()),
        ({"channels": None}, ()),
        ({"channels": [{"label": "DNA"}]}, ("DNA",)),
        ({"channels": [{"color": "FF0000"}, {"label": "actin"}]}, ("0", "actin")),
        (
            {"channels": [None, {"label": None}, {"label": ""}, {"label": 488}]},
            ("0", "1", "2", "488"),
        ),
        ("text", ()),
    ],
)
def test_channel_names_keep_their_places(tmp_path, omero, names):
    path = write_image(tmp_path / "image.zarr", blobs((3, *SHAPE)), axes="czyx")
    set_ome(path, {**ome_of(path), **({"omero": omero} if omero is not None else {})})
    assert read_image(Location.of(path)).channel_names == names


def test_axis_types_and_units_may_be_missing(tmp_path):
    def change(entry):
        for axis in entry["axes"]:
            axis.pop("unit", None)
        entry.pop("name")

    path = edit(
        write_image(tmp_path / "cells 1.2.ome.zarr", blobs(SHAPE), scale={"z": 0.3}), change
    )
    image = read_image(Location.of(path))
    assert image.name == "cells 1.2"
    assert image.spacing_um == (0.3, 1.0, 1.0)
    assert [axis.type for axis in image.axes] == ["space"] * 3


@pytest.mark.parametrize(
    ("unit", "um"), [("nanometer", 1e-3), ("millimeter", 1e3), ("pixel", 1.0), (None, 1.0)]
)
def test_spacing_is_in_micrometres(tmp_path, unit, um):
    def change(entry):
        for axis in entry["axes"]:
            axis["unit"] = unit

    path = edit(write_image(tmp_path / "i.zarr", blobs(SHAPE), scale={"z": 2.0}), change)
    assert_allclose(read_image(Location.of(path)).spacing_um, (2 * um, um, um))


PIXELS = "omezarr/pixels"
THIRD_PARTY = [f"{n}_dataset_{v}.ome.zarr" for n in ("3d_xyz", "4d", "5d") for v in ("v4", "v5")]


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_images_of_other_programs(shared_data, name):
    path = shared_data / PIXELS / name
    image = read_image(Location.of(path))
    assert [image.volume_shape(i) for i in range(2)] == [(16, 64, 64), (8, 32, 32)]
    last = {"t": image.extent("t") - 1, "c": image.extent("c") - 1}
    expected = zarr.open_array(path / image.levels[0].path, mode="r")[...]
    values = volume_of(path, **last).read(Box.of((16, 64, 64)))
    assert values.any()
    assert_array_equal(values, expected[(-1,) * (expected.ndim - 3)])


@pytest.mark.parametrize("name", ["hcs_bf2raw_v04.zarr", "hcs_resaved_v05.zarr"])
def test_plates_of_other_programs_say_where_an_image_is(shared_data, name):
    with pytest.raises(SourceError, match=r"is an HCS plate .*such as (\S+)\)") as caught:
        read_image(Location.of(shared_data / PIXELS / name))
    named = Path(str(caught.value).partition("such as ")[2].partition(")")[0])
    assert "multiscales" in ome_of(named)


# -- what is no image


def group(path: Path, attributes: dict, zarr_format: int = 3) -> None:
    zarr.open_group(path, mode="w", zarr_format=zarr_format).attrs.put(attributes)


def _tiff(path):
    import tifffile

    tifffile.imwrite(path, blobs(SHAPE))


def _broken_json(path):
    write_image(path, blobs(SHAPE))
    (path / "zarr.json").write_text('{"zarr_format": 3, ')


def _level_gone(path):
    import shutil

    shutil.rmtree(write_image(path, blobs(SHAPE), blobs((5, 10, 9))) / "1")


def _level_is_a_file(path):
    _level_gone(path)
    (path / "1").write_text("5, 10, 9")


def _level_broken(path):
    (write_image(path, blobs(SHAPE)) / "0/zarr.json").write_text("{")


def _with(change, **options):
    return lambda path: edit(
        write_image(path, blobs(options.pop("shape", SHAPE)), **options), change
    )


def _nothing(entry):
    pass


_WELL = {"images": [{"path": "0"}], "version": "0.4"}
_PLATE = {"plate": {"wells": [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}]}}
_BY_FILE = [{"type": "scale", "scale": [1, 1, 1]}, {"type": "translation", "path": "offsets"}]
NO_IMAGE = {
    "missing": (_nothing, "does not exist"),
    "tiff": (_tiff, "is a TIFF file"),
    "zip": (lambda p: p.write_bytes(b"PK\3\4rest"), "is a zip file"),
    "other file": (lambda p: p.write_bytes(b"hello"), "is a zarr file"),
    "empty file": (lambda p: p.write_bytes(b""), "file"),
    "empty folder": (lambda p: p.mkdir(), "is an empty folder"),
    "files": (
        lambda p: [(p / f"{i}.tif").mkdir(parents=True) for i in range(9)],
        "is a folder with 0.tif, .*, …",
    ),
    "array v3": (lambda p: zarr.create_array(p, shape=(4,), dtype="u1"), "is a single Zarr array"),
    "array v2": (
        lambda p: zarr.create_array(p, shape=(4,), dtype="u1", zarr_format=2),
        "is a single Zarr array",
    ),
    "group": (lambda p: group(p, {}), "is a Zarr group without multiscales"),
    "plate": (lambda p: group(p, {"ome": _PLATE}), "is an HCS plate .*/A/1/0"),
    "plate of nothing": (lambda p: group(p, {"plate": {}}, 2), "is an HCS plate"),
    "well": (lambda p: group(p, {"well": _WELL}, 2), "is a well of a plate .*/0"),
    "labels": (lambda p: group(p, {"ome": {"labels": ["cells"]}}), "is a labels group"),
    "bioformats2raw": (
        lambda p: group(p, {"bioformats2raw.layout": 3}, 2),
        "is a bioformats2raw collection",
    ),
    "multiscales of no kind": (
        lambda p: group(p, {"ome": {"multiscales": 3}}),
        "without multiscales",
    ),
    "empty multiscales": (lambda p: group(p, {"ome": {"multiscales": []}}), "without multiscales"),
    "broken json": (_broken_json, "metadata cannot be read"),
    "level gone": (_level_gone, "lists level '1', but no Zarr array is there"),
    "level is a file": (_level_is_a_file, "lists level '1', but no Zarr array is there"),
    "level broken": (_level_broken, "cannot be opened as a Zarr array"),
    "level is a group": (
        _with(lambda e: e["datasets"][0].update(path="")),
        "level ''|can be opened",
    ),
    "no datasets": (_with(lambda e: e.update(datasets=[])), "invalid: multiscales.datasets"),
    "no axes": (_with(lambda e: e.pop("axes")), "invalid: multiscales.axes"),
    "no scale": (_with(lambda e: e["datasets"][0].pop("coordinateTransformations")), "invalid"),
    "short scale": (
        _with(lambda e: e["datasets"][0]["coordinateTransformations"][0].update(scale=[1, 1])),
        "invalid",
    ),
    "scale in a file": (
        _with(lambda e: e.update(coordinateTransformations=[{"type": "scale", "path": "s"}])),
        "file",
    ),
    "translation in a file": (
        _with(lambda e: e.update(coordinateTransformations=_BY_FILE)),
        "invalid|file of its own",
    ),
    "infinite": (
        _with(
            lambda e: e["datasets"][0]["coordinateTransformations"][0].update(
                scale=[1, 1, float("inf")]
            )
        ),
        "finite",
    ),
    "version 0.1": (
        _with(lambda e: e.update(version="0.1"), version="0.4"),
        "is OME-Zarr 0.1; megaseg reads 0.4, 0.5 and 0.6",
    ),
    "no z": (_with(_nothing, axes="yx", shape=(20, 17)), r"has axes \['y', 'x'\] and no z"),
    "time for z": (_with(_nothing, axes="tyx"), r"has axes \['t', 'y', 'x'\] and no z"),
    "unknown axis": (_with(lambda e: e["axes"][0].update(name="phase")), "phase"),
    "axis missing": (_with(lambda e: e.update(axes=e["axes"][1:])), "invalid|dimensions"),
}


@pytest.mark.parametrize(("make", "found"), NO_IMAGE.values(), ids=NO_IMAGE)
def test_what_is_no_image_is_named(tmp_path, make, found):
    path = tmp_path / "source.zarr"
    make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SourceError, match=found) as caught:
        read_image(Location.of(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_newer_version_is_named(tmp_path):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    set_ome(path, {**ome_of(path), "version": "0.7"})
    with pytest.raises(SourceError, match=r"is OME-Zarr 0\.7; megaseg reads 0\.4, 0\.5 and 0\.6"):
        read_image(Location.of(path))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "0", "z", "space", "scale"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["path", "name", "type", "axes", "datasets", "scale", "version"]), inner
        )
    ),
    max_leaves=4,
)


def places(value, here=()):
    """All places in a JSON value."""
    yield here
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*here, key))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_metadata_give_an_image_or_a_reason(tmp_path, version, data):
    path = tmp_path / "image.zarr"
    if not path.exists():
        write_image(path, blobs((2, *SHAPE)), axes="czyx", channels=["a", "b"], version=version)
        (tmp_path / "ome.json").write_text(json.dumps(ome_of(path)))
    ome = json.loads((tmp_path / "ome.json").read_text())
    *way, last = data.draw(st.sampled_from([p for p in places(ome) if p]))
    parent = ome
    for key in way:
        parent = parent[key]
    if data.draw(st.booleans()) and isinstance(parent, dict):
        del parent[last]
    else:
        parent[last] = data.draw(json_values)
    set_ome(path, ome)
    image, reason = None, str(path)
    try:
        image = read_image(Location.of(path))
    except SourceError as error:
        reason = str(error)
    assert str(path) in reason
    if image is not None:
        assert image.volume_shape() == SHAPE
        assert image.with_pyramid().levels


@pytest.mark.parametrize(
    "channels", [True, 3, "dna", {"label": "dna"}, [1, None, {"label": "dna"}]]
)
def test_omero_channels_that_are_no_list_of_channels_name_nothing(channels, tmp_path):
    path = write_image(
        tmp_path / "image.zarr", blobs((3, *SHAPE)), axes="czyx", channels=["a", "b", "c"]
    )
    ome = ome_of(path)
    ome["omero"]["channels"] = channels
    set_ome(path, ome)
    assert read_image(Location.of(path)).channel_names in ((), ("0", "1", "dna"))


def test_the_specifications_own_examples(shared_data, tmp_path):
    """No case of the NGFF test suites is a 3D image, valid or not: each ends as a reason."""
    for version in ("0.4", "0.5"):
        suite = json.loads(
            (
                shared_data / f"omezarr/metadata/ngff_spec_{version}/tests/image_suite.json"
            ).read_text()
        )
        for i, case in enumerate(suite["tests"]):
            path = tmp_path / version / str(i)
            group(path, case["data"], 2 if version == "0.4" else 3)
            with pytest.raises(SourceError):
                read_image(Location.of(path))


# -- damaged and unreadable chunks


DAMAGED = {
    "v3 zstd": {},
    "v3 blosc": {"compressors": BloscCodec()},
    "v3 gzip": {"compressors": GzipCodec()},
    "v3 raw": {"compressors": None},
    "v3 sharded": {"chunks": (2, 5, 4), "shards": (4, 10, 12)},
    "v2 zstd": {**V2, "compressors": {"id": "zstd", "level": 1}},
    "v2 blosc": {**V2, "compressors": BLOSC},
    "v2 gzip": {**V2, "compressors": {"id": "gzip", "level": 1}},
    "v2 raw": {**V2, "compressors": None},
    "v2 dots": {**V2, "chunk_key_encoding": {"name": "v2", "separator": "."}},
}


def stored_object(path: Path, options: dict) -> Path:
    """The object of chunk or shard (1, 0, 1) of level 0."""
    if "version" not in options:
        return path / "0/c/1/0/1"
    return path / ("0/1.0.1" if "chunk_key_encoding" in options else "0/1/0/1")


def read_damaged(path: Path) -> np.ndarray:
    clear_array_cache()
    return volume_of(path).read(Box((2, 3, 4), (9, 18, 17)))


@pytest.mark.parametrize("part", [0, 1, 0.5, 0.9], ids=["empty", "one byte", "half", "nearly all"])
@pytest.mark.parametrize("options", DAMAGED.values(), ids=DAMAGED)
def test_a_truncated_chunk_is_named(tmp_path, options, part):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE), **{"chunks": (4, 10, 12), **options})
    victim = stored_object(path, options)
    whole = victim.read_bytes()
    victim.write_bytes(whole[: part if isinstance(part, int) else int(len(whole) * part)])
    with pytest.raises(DataError, match=f"chunk {victim} is corrupt"):
        read_damaged(path)


FLIPPED = {
    "v3 crc32c": ({"compressors": [ZstdCodec(), Crc32cCodec()]}, None),
    "v3 zstd with checksum": ({"compressors": ZstdCodec(checksum=True)}, None),
    "v3 zstd header": ({}, 0),
    "v3 blosc header": ({"compressors": BloscCodec()}, 4),
    "v3 sharded crc32c": (
        {"chunks": (2, 5, 4), "shards": (4, 10, 12), "compressors": Crc32cCodec()},
        None,
    ),
    "v3 shard index": ({"chunks": (2, 5, 4), "shards": (4, 10, 12)}, -10),
    "v2 zstd header": ({**V2, "compressors": {"id": "zstd", "level": 1}}, 0),
    "v2 blosc header": ({**V2, "compressors": BLOSC}, 4),
    "v2 gzip": ({**V2, "compressors": {"id": "gzip", "level": 1}}, -6),
}


@pytest.mark.parametrize(("options", "place"), FLIPPED.values(), ids=FLIPPED)
def test_a_flipped_bit_is_named_wherever_the_format_can_show_it(tmp_path, options, place):
    data = blobs(SHAPE)
    path = write_image(tmp_path / "image.zarr", data, **{"chunks": (4, 10, 12), **options})
    victim = stored_object(path, options)
    whole = victim.read_bytes()
    for at in [place] if place is not None else range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[at] ^= 0x40
        victim.write_bytes(bytes(damaged))
        with pytest.raises(DataError, match=f"chunk {victim} is corrupt"):
            read_damaged(path)
    victim.write_bytes(whole)
    assert_array_equal(read_damaged(path), data[2:9, 3:18, 4:17])


@pytest.mark.parametrize("options", DAMAGED.values(), ids=DAMAGED)
def test_a_chunk_that_the_system_cannot_read_is_a_store_error(tmp_path, options):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE), **{"chunks": (4, 10, 12), **options})
    victim = stored_object(path, options)
    victim.unlink()
    # A link to itself fails even for root, whom no permission stops.
    victim.symlink_to(victim.name)
    with pytest.raises(
        StoreError, match=f"cannot read {victim}: Too many levels of symbolic links"
    ):
        read_damaged(path)


def test_an_empty_shard_is_not_background_but_an_absent_one_is(tmp_path):
    """zarr 3.1 reads a shard of no bytes, which a full disk leaves behind, as the fill value."""
    options = {"chunks": (2, 5, 4), "shards": (4, 10, 12)}
    path = write_image(
        tmp_path / "image.zarr",
        blobs((2, *SHAPE)),
        axes="czyx",
        **{k: (1, *v) for k, v in options.items()},
    )
    victim = path / "0/c/1/1/0/0"
    victim.write_bytes(b"")
    volume = volume_of(path, c=1)
    shard, part = Box((4, 0, 0), (8, 10, 12)), Box((5, 1, 1), (6, 2, 2))
    for box in (Box.of(SHAPE), shard, part):
        with pytest.raises(DataError, match=f"chunk {victim} is corrupt"):
            volume.read(box)
    assert volume.read(Box.of((4, 10, 12))).all()
    victim.unlink()
    assert not volume.read(shard).any()


# -- writing volumes


WRITTEN = [("0.4", (4, 8, 8)), ("0.5", (4, 8, 8)), ("0.5", (9, 20, 17)), ("0.5", (128, 256, 256))]


@pytest.mark.parametrize("axes", ["zyx", "tzyx", "xyz", "txzy"])
@pytest.mark.parametrize(("version", "block"), WRITTEN)
def test_blocks_written_in_any_order_are_read_back(tmp_path, axes, version, block):
    extents = dict(zip("tzyx", (2, *SHAPE), strict=True))
    source = write_image(
        tmp_path / "source", blobs(tuple(extents[a] for a in axes)), axes=axes, version=version
    )
    image = read_image(Location.of(source))
    location = Location.of(tmp_path / "target/0")
    create_array(location, image, 0, "uint32", write_layout(SHAPE, block, sharded=version == "0.5"))
    array = zarr.open_array(location.url, mode="r")
    assert array.shape == image.levels[0].shape
    unit = array.shards or array.chunks
    assert all(n == 1 for name, n in zip(axes, unit, strict=True) if name == "t")
    assert version == "0.4" or array.metadata.dimension_names == tuple(axes)
    data = np.random.default_rng(0).integers(1, 2**32, (image.extent("t"), *SHAPE), dtype="uint32")
    for t, values in enumerate(data):
        target = Volume(location, image.axis_names, t=t)
        for box in reversed(list(BlockGrid(SHAPE, block))):
            target.write(box, values[box.slices])
    for t, values in enumerate(data):
        assert_array_equal(Volume(location, image.axis_names, t=t).read(Box.of(SHAPE)), values)


@pytest.mark.parametrize("torn", [b"", b"torn", b"\0" * 400])
@pytest.mark.parametrize(
    ("version", "block", "chunk"),
    [*((version, block, None) for version, block in WRITTEN), ("0.5", (4, 8, 8), (2, 4, 4))],
)
def test_a_torn_object_is_written_over(tmp_path, version, block, chunk, torn):
    """A block that is done again after a power loss replaces what it finds, also in shards."""
    source = write_image(tmp_path / "source", blobs(SHAPE), version=version)
    image = read_image(Location.of(source))
    location = Location.of(tmp_path / "target/0")
    layout = write_layout(SHAPE, block, sharded=version == "0.5")
    layout = replace(layout, chunk_shape=chunk or layout.chunk_shape)
    create_array(location, image, 0, "uint8", layout)
    volume = Volume(location, image.axis_names)
    for value in (1, 2):
        for box in BlockGrid(SHAPE, block):
            volume.write(box, np.full(box.shape, value, "uint8"))
        objects = [
            p
            for p in location.path.rglob("*")
            if p.is_file() and p.suffix == "" and p.name[0] != "."
        ]
        assert objects
        if value == 1:
            for victim in objects:
                victim.write_bytes(torn)
    assert (volume.read(Box.of(SHAPE)) == 2).all()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_arrays_are_created_over_what_was_there(tmp_path, version):
    source = write_image(tmp_path / "source", blobs(SHAPE), version=version)
    image = read_image(Location.of(source))
    location = Location.of(tmp_path / "target/0")
    layout = write_layout(SHAPE, (4, 8, 8), sharded=version == "0.5")
    create_array(location, image, 0, "uint8", layout)
    Volume(location, image.axis_names).write(Box.of(SHAPE), np.ones(SHAPE, "uint8"))
    clear_array_cache()
    create_array(location, image, 0, "float32", layout)
    values = Volume(location, image.axis_names).read(Box.of(SHAPE))
    assert values.dtype == "float32"
    assert not values.any()


def test_values_are_never_cast_on_the_way(tmp_path):
    image = read_image(Location.of(write_image(tmp_path / "source", blobs(SHAPE))))
    location = Location.of(tmp_path / "0")
    create_array(location, image, 0, "uint8", write_layout(SHAPE, SHAPE, sharded=True))
    with pytest.raises(TypeError, match="values have dtype uint16, the array has uint8"):
        Volume(location, image.axis_names).write(Box.of(SHAPE), np.full(SHAPE, 300, "uint16"))


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    image = read_image(Location.of(write_image(tmp_path / "source", blobs(SHAPE))))
    location = Location.of(tmp_path / "0")
    create_array(location, image, 0, "uint8", write_layout(SHAPE, SHAPE, sharded=True))
    (tmp_path / "0/c").write_text("in the way")
    with pytest.raises(StoreError, match=f"cannot write {location}: .*run the same command again"):
        Volume(location, image.axis_names).write(Box.of(SHAPE), np.ones(SHAPE, "uint8"))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_damaged_bit_of_what_we_wrote_never_passes(tmp_path, version):
    source = write_image(tmp_path / "source", blobs(SHAPE), version=version)
    image = read_image(Location.of(source))
    location = Location.of(tmp_path / "0")
    create_array(location, image, 0, "uint16", write_layout(SHAPE, SHAPE, sharded=version == "0.5"))
    volume, data = Volume(location, image.axis_names), blobs(SHAPE)
    volume.write(Box.of(SHAPE), data)
    victim = location.path / ("c/0/0/0" if version == "0.5" else "0/0/0")
    whole = victim.read_bytes()
    if version == "0.4":
        pytest.skip("Blosc has no checksum; jzarr, and so Fiji, reads no other codec that is fast")
    for at in range(0, len(whole), max(len(whole) // 50, 1)):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        victim.write_bytes(bytes(damaged))
        # Some bits mean nothing to the decoder; then the voxels are right.
        with suppress(DataError):
            assert_array_equal(volume.read(Box.of(SHAPE)), data)


@pytest.mark.parametrize("axes", ["zyx", "tczyx", "xyz"])
def test_attributes_are_read_back_as_the_same_image(tmp_path, axes):
    extents = dict(zip("tczyx", (2, 3, *SHAPE), strict=True))
    coarse = {**extents, "z": 9, "y": 10, "x": 8}
    levels = [blobs(tuple(e[a] for a in axes)) for e in (extents, coarse)]
    source = write_image(
        tmp_path / "source", *levels, axes=axes, scale={"z": 0.3, "y": 0.1, "x": 0.1, "t": 60.0}
    )
    image = read_image(Location.of(source))
    for version in ("0.4", "0.5"):
        path = tmp_path / version
        write_image(path, *levels, axes=axes, version=version)
        write_group(Location.of(path), version, image_attributes(replace(image, version=version)))
        stored = VERSIONS[version].zarr_format
        assert read_image(Location.of(path)) == replace(image, version=version, zarr_format=stored)


# -- transformations as programs write them

IDENTITY = {"type": "identity"}
SCALE = {"type": "scale", "scale": [2.0, 0.5, 0.25]}
TO_GLOBAL = {"input": {"name": "zyx", "axes": []}, "output": {"name": "global", "axes": []}}
ONES = (1.0, 1.0, 1.0)
WRITTEN = {
    "an identity": ([IDENTITY], None, ONES),
    "an identity of each": ([IDENTITY], [IDENTITY], ONES),
    "an identity of the image": ([SCALE], [IDENTITY], (2.0, 0.5, 0.25)),
    "none": ([], [], ONES),
    "an identity before a scale": ([IDENTITY, SCALE], None, (2.0, 0.5, 0.25)),
    "coordinate systems of SpatialData": (
        [SCALE],
        [
            {**IDENTITY, **TO_GLOBAL},
            {"type": "affine", "affine": [[1.0, 0.0]], **TO_GLOBAL},
            {"type": "sequence", "transformations": [SCALE], **TO_GLOBAL},
        ],
        (2.0, 0.5, 0.25),
    ),
}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("name", WRITTEN)
def test_transformations_that_change_nothing_are_read(name, version, tmp_path):
    of_dataset, of_image, scale = WRITTEN[name]

    def change(entry):
        entry["datasets"][0]["coordinateTransformations"] = of_dataset
        if of_image is not None:
            entry["coordinateTransformations"] = of_image

    path = edit(write_image(tmp_path / "i", blobs(SHAPE), version=version), change)
    image = read_image(Location.of(path))
    assert image.transform() == (scale, (0.0, 0.0, 0.0))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_versions_of_spatialdata_are_read(version, tmp_path):
    path = write_image(tmp_path / "i", blobs(SHAPE), version=version)
    ome = ome_of(path)
    stated = f"{version}-dev-spatialdata"
    if version == "0.5":
        ome["version"] = stated
    else:
        ome["multiscales"][0]["version"] = stated
    set_ome(path, ome)
    assert read_image(Location.of(path)).version == version


@given(
    st.lists(st.floats(0.001, 1000), min_size=3, max_size=3),
    st.lists(st.floats(-1e4, 1e4), min_size=3, max_size=3),
    st.lists(st.sampled_from([1, 2, 4]), min_size=3, max_size=3),
    st.lists(st.floats(0.1, 60), min_size=2, max_size=2),
    st.sampled_from(["0.4", "0.5"]),
)
def test_any_image_that_is_read_can_be_written_where_it_lies(scale, offset, factor, times, version):
    """A scale of time that gets smaller with the levels is that of the finer level."""
    axes = [{"name": n, "type": "time" if n == "t" else "space"} for n in "tzyx"]
    datasets = []
    for level, t in enumerate(times):
        steps = [t, *(s * f**level for s, f in zip(scale, factor, strict=True))]
        transforms = [{"type": "scale", "scale": steps}]
        transforms.append({"type": "translation", "translation": [0.0, *offset]})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    with tempfile.TemporaryDirectory() as folder:
        path = write_image(
            Path(folder) / "i",
            np.zeros((1, 4, 4, 4)),
            np.zeros((1, 2, 2, 2)),
            axes="tzyx",
            version=version,
        )
        edit(path, lambda entry: entry.update(axes=axes, datasets=datasets))
        image = read_image(Location.of(path))
    require_valid(image, "i")
    attributes = image_attributes(image)
    [written] = attributes.get("ome", attributes)["multiscales"]
    for number, (dataset, stored) in enumerate(zip(written["datasets"], datasets, strict=True)):
        found, expected = (d["coordinateTransformations"] for d in (dataset, stored))
        assert found[0]["scale"][1:] == expected[0]["scale"][1:]
        assert found[0]["scale"][0] == max(times[: number + 1])
        assert list(found[1:]) == (expected[1:] if any(offset) else [])


PYDANTIC = re.compile(r"Field required|Input should|validation error|\[type=|tuple\[|VectorScale")
BROKEN = {
    "no transformations": (
        lambda e: e["datasets"][0].pop("coordinateTransformations"),
        r"multiscales\.datasets\.0\.coordinateTransformations is missing; correct them, or write",
    ),
    "no path": (lambda e: e["datasets"][0].pop("path"), r"datasets\.0\.path is missing"),
    "no axes": (lambda e: e.pop("axes"), r"multiscales\.axes is missing"),
    "no datasets": (lambda e: e.update(datasets=[]), "has too few entries"),
    "datasets of no kind": (lambda e: e.update(datasets=7), "datasets must be a list"),
    "a path of no kind": (lambda e: e["datasets"][0].update(path=7), "path must be text"),
    "axes of no kind": (lambda e: e.update(axes="zyx"), "axes must be a list"),
    "no axis": (lambda e: e.update(axes=[1, 2, 3]), "axes.0 must be an object with keys"),
    "a scale of no kind": (
        lambda e: e["datasets"][0]["coordinateTransformations"][0].update(scale="large"),
        "invalid: multiscales",
    ),
    "an unknown transformation": (
        lambda e: e["datasets"][0].update(coordinateTransformations=[{"type": "rotation"}]),
        "invalid: multiscales",
    ),
}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_are_told_in_our_words(name, version, tmp_path):
    change, words = BROKEN[name]
    path = edit(write_image(tmp_path / "i", blobs(SHAPE), version=version), change)
    with pytest.raises(SourceError, match=words) as caught:
        read_image(Location.of(path))
    assert not PYDANTIC.search(str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_without_end_and_nesting_without_end_are_named(tmp_path):
    path = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    document = json.loads((path / "zarr.json").read_text())
    (dataset,) = document["attributes"]["ome"]["multiscales"][0]["datasets"]
    dataset["coordinateTransformations"][0]["scale"] = [10**400, 1, 1]
    for text in (json.dumps(document), "[" * 100_000):
        (path / "zarr.json").write_text(text)
        with pytest.raises(SourceError, match=r"image\.zarr"):
            read_image(Location.of(path))


def test_models_of_metadata_are_complete_before_threads_use_them():
    """Pydantic completes a model at its first use: of two threads one may find it without parts."""
    code = """
from megaseg_dask.ngff.versions import VERSIONS

for version in VERSIONS.values():
    print(version.models.multiscales.Multiscale.__pydantic_complete__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(VERSIONS)

"""Plates of other programs, read; ours, opened by the field's own libraries.

ome-zarr-models validates what we write, with its images; ngio and ome-zarr-py
open it. The other way round, plates come from bioformats2raw, from its copy as
0.5, from ngio, from public archives and, made here as it makes them, from iohub.
"""

import shutil
import warnings
from pathlib import Path

import numpy as np
import ome_zarr_models
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import SourceError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.plate import (
    Acquisition,
    Field,
    Plate,
    is_plate,
    read_plate,
    select_fields,
    write_plate,
)
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

BOTH = pytest.mark.parametrize("version", ["0.4", "0.5"])
SHAPE = (4, 12, 10)
PLATE = Plate(
    "0.5",
    "screen",
    ("A", "B", "C"),
    ("1", "2", "03"),
    (
        Field("C", "03", "0", 7),
        Field("A", "1", "0", 7),
        Field("A", "1", "1", 8),
        Field("A", "2", "5"),
    ),
    (Acquisition(7, "morning"), Acquisition(8)),
)


def pixels(field: Field) -> np.ndarray:
    return blobs(SHAPE, seed=sum(map(ord, field.path)))


@pytest.fixture(params=["0.4", "0.5"])
def written(request, tmp_path) -> tuple[str, Path]:
    """A plate of ours, with images that zarr alone wrote."""
    version, path = request.param, tmp_path / "screen.zarr"
    for field in PLATE.fields:
        write_image(path / field.path, pixels(field), version=version)
    write_plate(Location.of(path), PLATE, version)
    return version, path


# -- ours


def test_ome_zarr_models_finds_plate_wells_and_images_valid(written):
    version, path = written
    package = {"0.4": ome_zarr_models.v04, "0.5": ome_zarr_models.v05}[version]
    group = zarr.open_group(path, mode="r")
    assert isinstance(ome_zarr_models.open_ome_zarr(group, version=version), package.hcs.HCS)
    plate = package.hcs.HCS.from_zarr(group)
    listing = plate.ome_attributes.plate
    assert (listing.name, listing.version, listing.field_count) == ("screen", version, 2)
    assert [
        (row.name, column.name) for row, column in zip(listing.rows, listing.columns, strict=True)
    ] == [("A", "1"), ("B", "2"), ("C", "03")]
    assert [(a.id, a.name, a.maximumfieldcount) for a in listing.acquisitions] == [
        (7, "morning", 1),
        (8, None, 1),
    ]
    found = []
    for well, group in zip(listing.wells, plate.well_groups, strict=True):
        assert (
            well.path
            == f"{listing.rows[well.rowIndex].name}/{listing.columns[well.columnIndex].name}"
        )
        images = group.ome_attributes.well.images
        found += [Field(*well.path.split("/"), image.path, image.acquisition) for image in images]
        # Each was validated as an image on the way.
        assert set(group.members) == {image.path for image in images}
    assert tuple(found) == PLATE.fields


def test_ngio_opens_it(written):
    import ngio

    _, path = written
    plate = ngio.open_ome_zarr_plate(path, mode="r")
    assert (plate.rows, plate.columns) == (["A", "B", "C"], ["1", "2", "03"])
    assert plate.acquisition_ids == [7, 8]
    assert plate.acquisitions_names == ["morning", None]
    assert sorted(plate.images_paths(max_workers=1)) == sorted(field.path for field in PLATE.fields)
    for acquisition in (7, 8):
        paths = plate.images_paths(acquisition=acquisition, max_workers=1)
        assert paths == [field.path for field in PLATE.fields if field.acquisition == acquisition]
    for field in PLATE.fields:
        image = plate.get_image(
            row=field.row, column=field.column, image_path=field.name
        ).get_image()
        assert_array_equal(image.get_as_numpy(), pixels(field))


def test_ome_zarr_py_stitches_it(tmp_path):
    """Its plates show the first field of every well, one of the same shape in each."""
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    fields = [Field("A", "1", "0", 7), Field("B", "2", "0", 7)]
    for version in ("0.4", "0.5"):
        path = tmp_path / f"{version}.zarr"
        for field in fields:
            write_image(path / field.path, pixels(field), version=version)
        write_plate(
            Location.of(path),
            Plate("0.5", "p", ("A", "B"), ("1", "2"), tuple(fields), (Acquisition(7),)),
            version,
        )
        node = next(iter(Reader(parse_url(path))()))
        stitched = node.data[0].compute()
        assert stitched.shape == (4, 24, 20)
        assert_array_equal(stitched[:, :12, :10], pixels(fields[0]))
        assert_array_equal(stitched[:, 12:, 10:], pixels(fields[1]))
        assert not stitched[:, 12:, :10].any()
        assert node.metadata["metadata"]["plate"]["name"] == "p"


def test_a_choice_of_fields_is_a_plate_too(written):
    version, path = written
    part = select_fields(read_plate(Location.of(path)), wells="A/*", acquisition=8)
    target = path.with_name("part.zarr")
    for field in part.fields:
        write_image(target / field.path, pixels(field), version=version)
    write_plate(Location.of(target), part, version)
    plate = ome_zarr_models.open_ome_zarr(zarr.open_group(target, mode="r"), version=version)
    assert [well.path for well in plate.ome_attributes.plate.wells] == ["A/1"]
    assert [
        [image.path for image in well.ome_attributes.well.images] for well in plate.well_groups
    ] == [["1"]]


# -- theirs


def read_fields(location: Location, plate: Plate) -> list[np.ndarray]:
    """Read the first volume of every field."""
    found = []
    for field in plate.fields:
        image = read_image(location / field.path)
        volume = Volume(location / field.path / image.levels[0].path, image.axis_names)
        found.append(volume.read(Box.of(image.volume_shape())))
    return found


@pytest.mark.parametrize(
    ("name", "version"), [("hcs_bf2raw_v04.zarr", "0.4"), ("hcs_resaved_v05.zarr", "0.5")]
)
def test_plates_of_bioformats2raw(shared_data, name, version):
    location = Location.of(shared_data / "omezarr/pixels" / name)
    assert is_plate(location)
    plate = read_plate(location)
    assert (plate.version, plate.name) == (version, "Plate Name 0")
    assert (plate.rows, plate.columns) == (("A", "B"), ("1", "2"))
    assert plate.acquisitions == (Acquisition(0),)
    assert plate.missing == ()
    assert plate.fields == tuple(Field(r, c, f, 0) for r in "AB" for c in "12" for f in "01")
    for field, voxels in zip(plate.fields, read_fields(location, plate), strict=True):
        stored = zarr.open_array(location.path / field.path / "0", mode="r")[...]
        assert_array_equal(voxels, stored[0, 0])
        assert voxels.any()


@BOTH
def test_plates_of_ngio(tmp_path, version):
    import ngio

    wells = [
        ngio.ImageInWellPath(
            row="B", column=3, path="0", acquisition_id=1, acquisition_name="first"
        ),
        ngio.ImageInWellPath(
            row="A", column=12, path="0", acquisition_id=1, acquisition_name="first"
        ),
        ngio.ImageInWellPath(row="A", column=12, path="0_registered", acquisition_id=2),
        ngio.ImageInWellPath(row="A", column=12, path="5"),
    ]
    with warnings.catch_warnings():
        # Of the underscore that Fractal's tasks give to what they derive.
        warnings.simplefilter("ignore")
        ngio.create_empty_plate(
            tmp_path / "p.zarr", name="mine", images=wells, ngff_version=version
        )
    location = Location.of(tmp_path / "p.zarr")
    plate = read_plate(location)
    assert (plate.version, plate.name, plate.rows, plate.columns) == (
        version,
        "mine",
        ("A", "B"),
        ("03", "12"),
    )
    assert {(f.path, f.acquisition) for f in plate.fields} == {
        ("B/03/0", 1),
        ("A/12/0", 1),
        ("A/12/0_registered", 2),
        ("A/12/5", None),
    }
    assert plate.acquisitions == (Acquisition(1, "first"), Acquisition(2))
    write_plate(Location.of(tmp_path / "ours.zarr"), plate, version)
    assert ngio.open_ome_zarr_plate(tmp_path / "ours.zarr", mode="r").images_paths(
        max_workers=1
    ) == [field.path for field in plate.fields]


IDENTITY = {"type": "identity"}


def make_iohub_plate(
    path: Path, version: str, *, identities: bool = False, shape: tuple[int, ...] = SHAPE
) -> dict[str, np.ndarray]:
    """Write what iohub 0.3.11 writes, as measured; it needs Python 3.12 and is not installed here.

    With ``identities`` as iohub writes until 0.2.3, where no scale is given: one transformation
    `identity` of the dataset and one of the image (`iohub/ngff/nodes.py`, `_create_image_meta`).
    """
    voxels = {
        place: blobs((1, 2, *shape), seed=i)
        for i, place in enumerate(("A/1/0", "A/1/1", "H/12/000000"))
    }
    rows, columns = [{"name": "A"}, {"name": "H"}], [{"name": "1"}, {"name": "12"}]
    wells = [{"path": w, "rowIndex": i, "columnIndex": i} for i, w in enumerate(("A/1", "H/12"))]
    plate = {
        "version": version,
        "acquisitions": [{"id": 0}],
        "rows": rows,
        "columns": columns,
        "wells": wells,
    }

    def group(place: str, attributes: dict) -> zarr.Group:
        made = zarr.open_group(path / place, mode="a", zarr_format={"0.4": 2, "0.5": 3}[version])
        made.attrs.put(
            {"ome": {**attributes, "version": version}}
            if attributes and version == "0.5"
            else attributes
        )
        return made

    group("", {"plate": plate})
    for well, names in (("A/1", "01"), ("H/12", ["000000"])):
        group(well[0], {})
        group(
            well,
            {
                "well": {
                    "version": version,
                    "images": [{"acquisition": 0, "path": n} for n in names],
                }
            },
        )
    kinds = {
        "T": ("time", "second"),
        "C": ("channel", None),
        **dict.fromkeys("ZYX", ("space", "micrometer")),
    }
    axes = [{"name": a, "type": t, **({"unit": u} if u else {})} for a, (t, u) in kinds.items()]
    for place, data in voxels.items():
        scale = {"type": "scale", "scale": [1.0] * 5}
        entry = {
            "version": version,
            "axes": axes,
            "datasets": [{"path": "0", "coordinateTransformations": [scale]}],
        }
        if identities:
            entry["datasets"][0]["coordinateTransformations"] = [IDENTITY]
            entry["coordinateTransformations"] = [IDENTITY]
        omero = {"version": version, "id": 0, "channels": [{"label": "DAPI"}, {"label": "GFP"}]}
        image = group(place, {"multiscales": [{**entry, "name": place[4:]}], "omero": omero})
        options = {"dimension_names": list("TCZYX")} if version == "0.5" else {}
        image.create_array("0", data=data, chunks=(1, 1, *shape), **options)
    return voxels


@BOTH
def test_plates_of_iohub(tmp_path, version):
    """Its axes have names in capitals."""
    voxels = make_iohub_plate(tmp_path / "p.zarr", version)
    location = Location.of(tmp_path / "p.zarr")
    plate = read_plate(location)
    assert (plate.version, plate.name, plate.acquisitions) == (version, "p", (Acquisition(0),))
    assert {field.path: field.acquisition for field in plate.fields} == dict.fromkeys(voxels, 0)
    for field, found in zip(plate.fields, read_fields(location, plate), strict=True):
        image = read_image(location / field.path)
        assert image.axis_names == ("t", "c", "z", "y", "x")
        assert image.channel_names == ("DAPI", "GFP")
        assert_array_equal(found, voxels[field.path][0, 0])


@pytest.mark.parametrize("in_place", [False, True])
def test_plates_of_iohub_before_0_3_are_segmented(in_place, tmp_path, tiny_bundle):
    import ngio

    source = tmp_path / "p.zarr"
    voxels = make_iohub_plate(source, "0.4", identities=True, shape=(16, 32, 32))
    image = read_image(Location.of(source / "A/1/0"))
    assert (image.levels[0].scale, image.scale) == ((1.0,) * 5, ())
    target = source if in_place else tmp_path / "out.zarr"
    options = {"model": str(tiny_bundle), "channel": "GFP", "outputs": "labels"}
    if not in_place:
        options |= {"outputs": "labels,scores", "ome_zarr": "0.4"}
    result = segment_here(str(source), str(target), parse_settings(options))
    assert result.status == "done", result.failures
    for place, data in voxels.items():
        labels = read_image(Location.of(target / place / "labels/megaseg"))
        assert labels.levels[0].scale == (1.0,) * 4
        if in_place:
            # ngio refuses these images as they are.
            continue
        opened = ngio.open_ome_zarr_container(target / place, mode="r")
        labels = opened.get_label("megaseg")
        assert labels.shape == (1, *data.shape[2:])
        assert labels.pixel_size == opened.get_image().pixel_size


def test_names_of_axes_that_differ_only_in_case_are_refused(tmp_path):
    make_iohub_plate(tmp_path / "p.zarr", "0.5")
    group = zarr.open_group(tmp_path / "p.zarr/A/1/0", mode="r+")
    ome = group.attrs["ome"]
    ome["multiscales"][0]["axes"][1]["name"] = "z"
    group.attrs["ome"] = ome
    with pytest.raises(SourceError, match="each axis may occur only once"):
        read_image(Location.of(tmp_path / "p.zarr/A/1/0"))


METADATA = "omezarr/metadata"


@pytest.mark.parametrize(
    ("name", "fields", "n_missing"),
    [
        # Only four wells of this one were kept.
        ("yaozarrs/v05/76-45.ome.zarr", ["A/1/0", "A/2/0", "B/1/0", "B/2/0"], 380),
        ("yaozarrs/v05/190129.zarr", [], 49),
        # Rows and columns are exchanged in its numbers, and its acquisitions are not listed.
        ("ome_zarr_examples/valid/plate-01.zarr", ["A/1/0", "A/2/0", "B/1/0", "B/2/0"], 0),
        ("ome_zarr_models/v04/hcs_example.ome.zarr", ["B/03/0"], 0),
    ],
)
def test_plates_of_public_archives(shared_data, name, fields, n_missing):
    plate = read_plate(Location.of(shared_data / METADATA / name))
    assert sorted(field.path for field in plate.fields) == fields
    assert len(plate.missing) == n_missing
    assert all(reason.startswith("the plate lists this well, but ") for _, reason in plate.missing)


def test_a_plate_of_many_acquisitions(shared_data, tmp_path):
    shutil.copytree(shared_data / METADATA / "yaozarrs/v04/2551.zarr", tmp_path / "p.zarr")
    # The copy came without it.
    (tmp_path / "p.zarr/.zgroup").write_text('{"zarr_format": 2}')
    plate = read_plate(Location.of(tmp_path / "p.zarr"))
    late = select_fields(plate, acquisition=2654)
    assert [field.path for field in late.fields] == ["A/2/3"]
    assert [a.name for a in plate.acquisitions if a.id == 2654] == ["Meas_04(2012-07-31_14-27-40)"]


def test_a_broken_plate_reads_as_far_as_it_goes(shared_data):
    """Its listing is whole.

    A well has no metadata, and of some images levels, axes or groups are missing.
    """
    location = Location.of(shared_data / METADATA / "yaozarrs/broken/broken_v05.ome.zarr")
    plate = read_plate(location)
    assert plate.missing == (("C/3", "C/3/zarr.json lists no fields"),)
    assert len(plate.fields) == 16
    for field in plate.fields:
        with pytest.raises(SourceError):
            read_image(location / field.path)

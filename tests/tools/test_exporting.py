"""Labels as OME-TIFF: what tifffile reads, voxel for voxel, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from numpy.testing import assert_array_equal
from ome_types import from_xml
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import SourceError, TargetError
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.stores import Location
from megaseg_dask.tools.exporting import export_labels
from tests.fixtures.images import write_image

SPACING_UM = {"z": 0.29, "y": 0.108, "x": 0.11}


@pytest.fixture
def ids() -> np.ndarray:
    """Ids in timepoints ``(t, z, y, x)``."""
    return np.random.default_rng(0).integers(0, 2**20, (3, 70, 21, 34)).astype(np.uint32)


def write_with_labels(path: Path, ids: np.ndarray) -> Path:
    write_image(path, np.zeros(ids.shape, np.uint8), axes="tzyx")
    label = write_image(path / "labels/nuclei", ids, axes="tzyx", scale=SPACING_UM)
    group = zarr.open_group(label)
    group.attrs["ome"] = {**group.attrs["ome"], "image-label": {}}
    zarr.open_group(path / "labels").attrs["ome"] = {"version": "0.5", "labels": ["nuclei"]}
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int32"])
def test_the_file_holds_the_voxels_and_their_size(ids, dtype, tmp_path):
    ids = ids.astype(dtype) & 0x7F
    image = write_with_labels(tmp_path / "image.zarr", ids)
    file = tmp_path / "labels.ome.tif"
    assert export_labels(str(image), str(file)) == [file]
    assert_array_equal(tifffile.imread(file).reshape(ids.shape), ids)
    with tifffile.TiffFile(file) as written:
        [described] = from_xml(written.ome_metadata).images
    pixels = described.pixels
    assert (pixels.size_t, pixels.size_z, pixels.size_y, pixels.size_x) == ids.shape
    sizes = (pixels.physical_size_z, pixels.physical_size_y, pixels.physical_size_x)
    assert sizes == pytest.approx(tuple(SPACING_UM.values()))
    assert pixels.physical_size_x_unit.value == "µm"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".unfinished"] == []


def test_each_field_of_a_plate_gets_a_file(ids, tmp_path):
    plate = tmp_path / "plate.zarr"
    fields = (Field("A", "1", "0"), Field("B", "2", "0"))
    write_plate(Location.of(plate), Plate("0.5", "p", ("A", "B"), ("1", "2"), fields), "0.5")
    for n, field in enumerate(fields):
        write_with_labels(plate / field.path, ids + n)
    files = export_labels(str(plate), str(tmp_path / "out"))
    assert [file.name for file in files] == ["A_1_0.ome.tif", "B_2_0.ome.tif"]
    for n, file in enumerate(files):
        assert_array_equal(tifffile.imread(file), ids + n)


def test_what_cannot_be_exported_is_named_and_nothing_is_written(ids, tmp_path):
    image = write_with_labels(tmp_path / "image.zarr", ids[:1])
    file = tmp_path / "labels.ome.tif"
    with pytest.raises(TargetError, match="not a name of a TIFF file"):
        export_labels(str(image), str(tmp_path / "labels.png"))
    bare = write_image(tmp_path / "bare.zarr", np.zeros((8, 8, 8), np.uint8))
    with pytest.raises(SourceError, match="no label image"):
        export_labels(str(bare), str(file))
    for n, wrong in enumerate((2**32, -1)):
        beyond = write_with_labels(tmp_path / f"{n}.zarr", np.full((1, 8, 8, 8), wrong, np.int64))
        with pytest.raises(SourceError, match=f"has the id {wrong}"):
            export_labels(str(beyond), str(file))
    shown = CliRunner().invoke(build_app(), ["export", str(image), str(file), "--level", "9"])
    assert shown.exit_code == 2
    assert "levels 0 to" in shown.output
    assert not list(tmp_path.glob("*.tif*"))
    assert not list(tmp_path.glob(".*"))


def test_a_place_that_cannot_be_written_is_named(ids, tmp_path):
    image = write_with_labels(tmp_path / "image.zarr", ids[:1])
    (tmp_path / "file").write_text("no folder")
    file = tmp_path / "file/labels.ome.tif"
    shown = CliRunner().invoke(build_app(), ["export", str(image), str(file)])
    assert shown.exit_code == 2
    assert f"{file} cannot be written" in shown.output


def test_a_target_of_a_run_that_is_not_finished_is_named_so(tmp_path):
    target = tmp_path / "out.zarr"
    zarr.create_group(target)
    (tmp_path / "out.zarr.run/megaseg").mkdir(parents=True)
    (tmp_path / "out.zarr.run/megaseg/plan.json").touch()
    shown = CliRunner().invoke(build_app(), ["export", str(target), str(tmp_path / "a.ome.tif")])
    assert shown.exit_code == 2
    assert "a run that is not finished (run the same megaseg segment command again" in shown.output


def test_a_file_that_is_there_is_replaced_only_with_overwrite(ids, tmp_path):
    image = write_with_labels(tmp_path / "image.zarr", ids[:1])
    file = tmp_path / "labels.ome.tif"
    file.write_text("mine")
    run = CliRunner().invoke
    refused = run(build_app(), ["export", str(image), str(file)])
    assert refused.exit_code == 2
    assert "--overwrite" in refused.output
    assert file.read_text() == "mine"
    assert run(build_app(), ["export", str(image), str(file), "--overwrite"]).exit_code == 0
    assert_array_equal(tifffile.imread(file), ids[0])

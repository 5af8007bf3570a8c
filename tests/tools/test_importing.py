"""Files of microscopes become OME-Zarr, voxel for voxel, and other programs read it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from ngio import open_ome_zarr_container, open_ome_zarr_plate
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.labels import require_marked
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location
from megaseg_dask.stores.arrays import clear_array_cache
from megaseg_dask.tools.importing import convert
from megaseg_dask.tools.importing.convert import import_files
from megaseg_dask.tools.importing.files import FileSeries, open_file
from megaseg_dask.tools.importing.pattern import group_files
from megaseg_dask.tools.importing.planning import ImportOptions, parse_options, plan_import
from megaseg_dask.tools.importing.work import ImportWork
from tests.fixtures.microscopes import write_lif, write_nd2

SIZE = (0.3, 0.1, 0.1)
HERE = parse_settings({"workers": 0})


def noise(shape, dtype="uint16", seed=0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 250, shape)
    if np.dtype(dtype).kind == "i":
        values = values - 125
    return (values * 1.5 if np.dtype(dtype).kind == "f" else values).astype(dtype)


def write_tiff(path, values, **options) -> None:
    tifffile.imwrite(path, values, photometric="minisblack", **options)


def imported(files, target, settings=HERE, **options):
    files = [files] if isinstance(files, str | Path) else files
    return import_files([str(f) for f in files], str(target), ImportOptions(**options), settings)


def hashes(array: np.ndarray) -> list[str]:
    planes = array.reshape(-1, *array.shape[-2:])
    return [hashlib.sha256(np.ascontiguousarray(plane).tobytes()).hexdigest() for plane in planes]


# -- voxels


@pytest.mark.parametrize(
    ("axes", "shape", "dtype"),
    [
        ("ZYX", (5, 40, 30), "uint8"),
        ("ZCYX", (4, 2, 40, 30), "uint16"),
        ("TCZYX", (2, 3, 4, 40, 30), "int16"),
        ("CTZYX", (3, 2, 4, 40, 30), "float32"),
        ("TZXYC", (2, 3, 30, 40, 2), "int32"),
    ],
)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_each_plane_is_what_it_was(tmp_path, axes, shape, dtype, version):
    values = noise(shape, dtype)
    path = tmp_path / "image.tif"
    write_tiff(path, values, metadata={"axes": axes})
    imported(
        path,
        tmp_path / "image.zarr",
        parse_settings({"workers": 0, "ome_zarr": version}),
        voxel_size=SIZE,
    )
    order = [axis for axis in "TCZYX" if axis in axes]
    expected = values.transpose([axes.index(axis) for axis in order])
    stored = zarr.open_array(tmp_path / "image.zarr/0", mode="r")
    assert stored.dtype == values.dtype
    assert hashes(stored[...]) == hashes(expected)
    with tifffile.TiffFile(path) as file:
        again = np.concatenate([page.asarray()[None] for page in file.pages])
    assert sorted(hashes(again.reshape(shape).transpose([axes.index(a) for a in order]))) == sorted(
        hashes(stored[...])
    )


@pytest.mark.parametrize(
    "options",
    [
        {"imagej": True},
        {"ome": True},
        {"ome": True, "bigtiff": True, "tile": (32, 32), "compression": "zlib"},
        {"bigtiff": True, "rowsperstrip": 7, "compression": "zlib", "byteorder": ">"},
    ],
)
def test_kinds_of_tiff(tmp_path, options):
    axes = "TZCYX" if "imagej" in options else "TCZYX"
    values = noise((2, 3, 4, 50, 45))
    stored_as = values.transpose(0, 2, 1, 3, 4) if "imagej" in options else values
    write_tiff(tmp_path / "a.tif", stored_as, metadata={"axes": axes}, **options)
    imported(tmp_path / "a.tif", tmp_path / "a.zarr", voxel_size=SIZE)
    container = open_ome_zarr_container(str(tmp_path / "a.zarr"), mode="r")
    np.testing.assert_array_equal(container.get_image().get_as_numpy(), values)


def test_a_block_of_the_least_memory_gives_the_same_voxels(tmp_path):
    values = noise((20, 300, 280))
    write_tiff(tmp_path / "a.tif", values, metadata={"axes": "ZYX"})
    few = parse_settings({"workers": 0, "memory": "403MB"})
    plan = plan_import(
        [str(tmp_path / "a.tif")], str(tmp_path / "a.zarr"), ImportOptions(voxel_size=SIZE), few
    )
    assert len(plan.images[0].grid(0)) > 1
    imported(tmp_path / "a.tif", tmp_path / "a.zarr", few, voxel_size=SIZE)
    imported(tmp_path / "a.tif", tmp_path / "b.zarr", voxel_size=SIZE)
    for level in zarr.open_group(tmp_path / "b.zarr", mode="r").array_keys():
        ours = zarr.open_array(tmp_path / f"a.zarr/{level}", mode="r")[...]
        np.testing.assert_array_equal(ours, zarr.open_array(tmp_path / f"b.zarr/{level}")[...])


def test_levels_are_means_of_voxels(tmp_path):
    for dtype in ("int16", "uint32", "float32", "uint8"):
        values = noise((3, 300, 260), dtype)
        write_tiff(tmp_path / "a.tif", values, metadata={"axes": "ZYX"})
        shutil.rmtree(tmp_path / "a.zarr", ignore_errors=True)
        imported(tmp_path / "a.tif", tmp_path / "a.zarr", voxel_size=(1.0, 0.1, 0.1))
        level = zarr.open_array(tmp_path / "a.zarr/1", mode="r")[...]
        expected = values.reshape(3, 150, 2, 130, 2).mean((2, 4), dtype=np.float64)
        if np.dtype(dtype).kind != "f":
            expected = np.rint(expected)
        np.testing.assert_array_equal(level, expected.astype(dtype))


def test_labels_stay_ids_at_all_levels_and_are_known_as_such(tmp_path):
    values = np.kron(noise((3, 75, 65), "uint16"), np.ones((1, 4, 4), "uint16"))
    values[1, ::2] = 0
    write_tiff(tmp_path / "a.tif", values, metadata={"axes": "ZYX"})
    for version in ("0.4", "0.5"):
        settings = parse_settings({"workers": 0, "ome_zarr": version})
        target = tmp_path / f"{version}.zarr"
        imported(tmp_path / "a.tif", target, settings, voxel_size=(1.0, 0.1, 0.1), labels=True)
        level = zarr.open_array(target / "1", mode="r")[...]
        # By mode, ties to the smallest id: half of each window is background in the middle plane.
        np.testing.assert_array_equal(level, values[:, 1::2, 1::2])
        image = read_image(Location.of(target))
        assert image.kind == "label image"
        require_marked(Location.of(target), image)
    write_tiff(tmp_path / "b.tif", values.astype("float32"), metadata={"axes": "ZYX"})
    with pytest.raises(SettingsError, match=r"--labels: .*of float32"):
        imported(tmp_path / "b.tif", tmp_path / "b.zarr", voxel_size=SIZE, labels=True)
    assert not (tmp_path / "b.zarr").exists()


def test_negative_ids_are_refused_before_anything_is_written(tmp_path):
    for name, lowest in (("t0.tif", 0), ("t1.tif", -7)):
        values = noise((2, 40, 30), "uint16").astype("int32")
        values[1, 39, 29] = lowest
        values[0, 0, 0] = min(lowest, 0) // 2
        write_tiff(tmp_path / name, values, metadata={"axes": "ZYX"})
    files = [tmp_path / "t0.tif", tmp_path / "t1.tif"]
    options = {"voxel_size": SIZE, "pattern": "t{time}.tif"}
    with pytest.raises(SourceError, match=r"t1\.tif has voxels of -7; .*--ignore") as refused:
        imported(files, tmp_path / "a.zarr", labels=True, **options)
    assert refused.value.exit_code == 2
    assert {path.name for path in tmp_path.iterdir()} == {"t0.tif", "t1.tif"}
    # Voxels of an image may be negative, and so may a dtype.
    imported(files, tmp_path / "image.zarr", **options)
    imported(files[0], tmp_path / "labels.zarr", voxel_size=SIZE, labels=True)


# -- what a file says


def test_sizes_times_and_names_come_from_the_file(tmp_path):
    metadata = {
        "axes": "TCZYX",
        "PhysicalSizeX": 110,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.11,
        "PhysicalSizeZ": 0.0003,
        "PhysicalSizeZUnit": "mm",
        "TimeIncrement": 500,
        "TimeIncrementUnit": "ms",
        "Channel": {"Name": ["DAPI", "GFP"]},
    }
    write_tiff(tmp_path / "a.ome.tif", noise((2, 2, 3, 32, 32)), metadata=metadata)
    done = imported(tmp_path / "a.ome.tif", tmp_path / "a.zarr")
    assert done.next_command.endswith("a-segmented.ome.zarr --channel DAPI")
    container = open_ome_zarr_container(str(tmp_path / "a.zarr"), mode="r")
    image = container.get_image()
    size = image.pixel_size
    np.testing.assert_allclose((size.z, size.y, size.x, size.t), (0.3, 0.11, 0.11, 0.5))
    assert image.channel_labels == ["DAPI", "GFP"]


def test_what_imagej_says(tmp_path):
    write_tiff(
        tmp_path / "a.tif",
        noise((3, 32, 32)),
        imagej=True,
        resolution=(10, 5),
        metadata={"axes": "ZYX", "spacing": 0.4, "unit": "um"},
    )
    with closing(open_file(tmp_path / "a.tif")) as file:
        assert file.contents.spacing_um == (0.4, 0.2, 0.1)


def test_what_is_not_known_is_asked_for(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, noise((5, 32, 32)), metadata=None)
    with pytest.raises(SettingsError, match=r"5×32×32 array are not known .* --axes.* ZYX"):
        imported(path, tmp_path / "a.zarr")
    with pytest.raises(SettingsError, match=r"z unknown, y unknown.*--voxel-size Z,Y,X"):
        imported(path, tmp_path / "a.zarr", axes="ZYX")
    with pytest.raises(SettingsError, match=r"--channel-names a,b: there is 1 channel"):
        imported(path, tmp_path / "a.zarr", axes="ZYX", voxel_size=SIZE, channel_names=("a", "b"))
    with pytest.raises(SettingsError, match=r"--axes YX: .* has 3 axes"):
        imported(path, tmp_path / "a.zarr", axes="YX", voxel_size=SIZE)
    assert not (tmp_path / "a.zarr").exists()


def test_one_of_several_series_is_chosen(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=True) as file:
        for n, name in ((3, "first"), (4, "secnd")):
            file.write(noise((n, 32, 32)), metadata={"axes": "ZYX", "Name": name})
    with pytest.raises(SettingsError, match=r"has 2 series; choose one with --series"):
        imported(tmp_path / "a.tif", tmp_path / "a.zarr", voxel_size=SIZE)
    with pytest.raises(SettingsError, match=r"--series second: .*0: first ZYX 3×32×32; 1: secnd"):
        imported(tmp_path / "a.tif", tmp_path / "a.zarr", voxel_size=SIZE, series="second")
    assert not (tmp_path / "a.zarr").exists()
    for series in ("1", "secnd"):
        imported(tmp_path / "a.tif", tmp_path / f"{series}.zarr", voxel_size=SIZE, series=series)
        assert zarr.open_array(tmp_path / f"{series}.zarr/0", mode="r").shape == (4, 32, 32)


def test_all_series_become_the_fields_of_wells(tmp_path):
    values = {name: noise((n, 32, 32), seed=n) for n, name in ((3, "B2-1"), (4, "B2-2"), (5, "C3"))}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        for name, image in values.items():
            file.write(image, metadata={"axes": "ZYX", "Name": name})
    options = {"voxel_size": SIZE, "series": "all"}
    imported(tmp_path / "a.ome.tif", tmp_path / "plain.zarr", **options)
    plate = open_ome_zarr_plate(str(tmp_path / "plain.zarr"), mode="r")
    assert plate.images_paths(max_workers=1) == ["A/1/0", "A/1/1", "A/1/2"]
    with pytest.raises(SettingsError, match=r"a\.ome\.tif:C3 does not match it"):
        imported(tmp_path / "a.ome.tif", tmp_path / "b.zarr", pattern="*:{well}-{field}", **options)
    with pytest.raises(SettingsError, match=r"has 3 series; add a colon"):
        imported(
            tmp_path / "a.ome.tif", tmp_path / "b.zarr", pattern="{channel}.ome.tif", **options
        )
    with tifffile.TiffWriter(tmp_path / "b.ome.tif") as file:
        for name in ("B2-1", "B2-2"):
            file.write(values[name], metadata={"axes": "ZYX", "Name": name})
    imported(tmp_path / "b.ome.tif", tmp_path / "b.zarr", pattern="*:{well}-{field}", **options)
    plate = open_ome_zarr_plate(str(tmp_path / "b.zarr"), mode="r")
    for path, image in plate.get_images(max_workers=1).items():
        expected = values[path.replace("B/2/", "B2-")]
        np.testing.assert_array_equal(image.get_image().get_as_numpy(), expected)


def test_a_file_that_is_cut_off_or_no_image_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, noise((5, 64, 64)), metadata={"axes": "ZYX"})
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(SourceError, match=r"the copy is incomplete"):
        imported(path, tmp_path / "a.zarr", voxel_size=SIZE)
    path.write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"a\.tif cannot be read"):
        imported(path, tmp_path / "a.zarr", voxel_size=SIZE)
    with pytest.raises(SourceError, match=r"does not exist"):
        imported(tmp_path / "b.tif", tmp_path / "a.zarr", voxel_size=SIZE)


@pytest.mark.slow
def test_czi(tmp_path):
    pytest.importorskip("bioio_czi", reason="the extra import is not installed")
    from pylibCZIrw import czi

    values = noise((2, 2, 3, 40, 36))
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for t, c, z in np.ndindex(2, 2, 3):
            file.write(values[t, c, z][..., None], plane={"T": t, "C": c, "Z": z})
        file.write_metadata(
            "a", channel_names={0: "dna", 1: "er"}, scale_x=1e-7, scale_y=1e-7, scale_z=3e-7
        )
    done = imported(tmp_path / "a.czi", tmp_path / "a.zarr")
    assert "--channel dna" in done.next_command
    container = open_ome_zarr_container(str(tmp_path / "a.zarr"), mode="r")
    np.testing.assert_array_equal(container.get_image().get_as_numpy(), values)
    np.testing.assert_allclose(container.get_image().pixel_size.zyx, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "write", "suffix"),
    [("bioio_nd2", write_nd2, ".nd2"), ("bioio_lif", write_lif, ".lif")],
)
def test_positions_of_a_microscope(module, write, suffix, tmp_path):
    pytest.importorskip(module, reason="the extra import is not installed")
    images = {name: noise((2, 4, 2, 20, 24), seed=n) for n, name in enumerate(("A1", "B2"))}
    path = tmp_path / f"a{suffix}"
    write(path, images, ("DAPI", "GFP"), SIZE)
    with pytest.raises(SettingsError, match=r"has 2 series; .*\(0: A1; 1: B2\)"):
        imported(path, tmp_path / "a.zarr")
    done = imported(path, tmp_path / "a.zarr", series="B2")
    assert "--channel DAPI" in done.next_command
    container = open_ome_zarr_container(str(tmp_path / "a.zarr"), mode="r")
    expected = images["B2"].transpose(0, 2, 1, 3, 4)
    np.testing.assert_array_equal(container.get_image().get_as_numpy(), expected)
    np.testing.assert_allclose(container.get_image().pixel_size.zyx, SIZE)
    assert container.get_image().channel_labels == ["DAPI", "GFP"]
    imported(path, tmp_path / "p.zarr", series="all", pattern="*:{well}")
    plate = open_ome_zarr_plate(str(tmp_path / "p.zarr"), mode="r")
    assert plate.images_paths(max_workers=1) == ["A/1/0", "B/2/0"]


@pytest.mark.slow
def test_a_size_that_an_nd2_file_does_not_know_is_asked_for(tmp_path):
    pytest.importorskip("bioio_nd2", reason="the extra import is not installed")
    images = {"only": noise((1, 4, 1, 20, 24))}
    write_nd2(tmp_path / "a.nd2", images, ("DAPI",), (0.3, None, None))
    with pytest.raises(SettingsError, match=r"z 0\.3, y unknown, x unknown"):
        imported(tmp_path / "a.nd2", tmp_path / "a.zarr")


@pytest.mark.parametrize("axes", ["ZZY", "ZYW", "ZY", "Z-Y", ""])
def test_axes_are_letters_that_are_known(axes):
    with pytest.raises(SettingsError, match=rf"--axes {axes}: expected a letter for each axis"):
        parse_options(axes=axes)


# -- several files


def write_plate(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir()
    fields = {}
    for number, (well, field) in enumerate(product(("A01", "B01", "C01"), ("1", "2"))):
        values = noise((2, 2, 4, 32, 40), seed=number)
        fields[f"{well[0]}/1/{field}"] = values
        for t, c in np.ndindex(2, 2):
            name = f"{well}_{field}_t{t + 9}_{('DAPI', 'GFP')[c]}.tif"
            write_tiff(folder / name, values[t, c], metadata={"axes": "ZYX"})
    return fields


def test_a_plate_by_pattern_is_read_by_ngio(tmp_path):
    fields = write_plate(tmp_path / "scan")
    files = sorted((tmp_path / "scan").iterdir())
    imported(
        files, tmp_path / "p.zarr", voxel_size=SIZE, pattern="{well}_{field}_t{time}_{channel}.tif"
    )
    plate = open_ome_zarr_plate(str(tmp_path / "p.zarr"), mode="r")
    assert sorted(plate.images_paths(max_workers=1)) == sorted(fields)
    for path, image in plate.get_images(max_workers=1).items():
        np.testing.assert_array_equal(image.get_image().get_as_numpy(), fields[path])
        assert image.get_image().channel_labels == ["DAPI", "GFP"]


def test_a_field_that_cannot_be_read_is_named_and_the_others_are_done(tmp_path, monkeypatch):
    write_plate(tmp_path / "scan")
    files = sorted((tmp_path / "scan").iterdir())
    options = {"voxel_size": SIZE, "pattern": "{well}_{field}_t{time}_{channel}"}
    options["pattern"] += ".tif"
    plan = convert._claim
    lost = tmp_path / "scan/B01_1_t9_DAPI.tif"

    def lose(planned):
        if lost.exists():
            lost.rename(tmp_path / "lost.tif")
        return plan(planned)

    monkeypatch.setattr(convert, "_claim", lose)
    result = imported(files, tmp_path / "p.zarr", **options).result
    assert result.exit_code == 1
    assert {failure.volume for failure in result.failures} == {"B/1/1 t=0 c=0"}
    assert "B01_1_t9_DAPI.tif is gone" in result.failures[0].error
    plate = open_ome_zarr_plate(str(tmp_path / "p.zarr"), mode="r")
    assert len(plate.images_paths(max_workers=1)) == 5
    monkeypatch.undo()
    (tmp_path / "lost.tif").rename(lost)
    assert imported(files, tmp_path / "p.zarr", **options).result.exit_code == 0
    plate = open_ome_zarr_plate(str(tmp_path / "p.zarr"), mode="r")
    assert len(plate.images_paths(max_workers=1)) == 6


@pytest.mark.parametrize(
    ("names", "pattern", "message"),
    [
        (
            ["a1.tif", "a2.tif"],
            None,
            r"2 files: describe their names with --pattern.* a\{time\}\.tif",
        ),
        (["a1.tif"], "b{time}.tif", r"a1\.tif does not match it"),
        (["a1.tif"], "a{tme}.tif", r"no part is named 'tme'; did you mean time"),
        (["a1.tif"], "a1.tif", r"has no part in braces"),
        (["a1.tif"], "a{field}.tif", r"fields need wells"),
        (["a_1_x.tif", "b_2_y.tif"], "*_{time}_*.tif", None),
        (["1/a1.tif", "2/a1.tif"], "a{time}.tif", r"are the same part"),
        (["1a.tif", "2a.tif", "1b.tif"], "{time}{channel}.tif", r"no file is time 2, channel b"),
        (
            ["A1_x.tif", "A1_y.tif", "A2_x.tif", "A3_y.tif"],
            "{well}_{channel}.tif",
            r"A/2/0 has no channel y, A/3/0 has no channel x; .*--allow-missing",
        ),
    ],
)
def test_patterns(names, pattern, message):
    files = [FileSeries(Path("/scan") / name) for name in names]
    if message is None:
        group_files(files, pattern)
        return
    with pytest.raises(SettingsError, match=message):
        group_files(files, pattern)


def test_fields_may_lack_what_others_have_if_that_is_said():
    files = [FileSeries(Path(f"/scan/{name}.tif")) for name in ("A1_x", "A1_y", "A2_x")]
    groups = group_files(files, "{well}_{channel}.tif", allow_missing=True)
    assert [group.values[1] for group in groups] == [("x", "y"), ("x",)]


def test_parts_follow_each_other_as_numbers_do():
    files = [FileSeries(Path(f"/scan/a_{n}.tif")) for n in (10, 9, 1)]
    [group] = group_files(files, "a_{time}.tif")
    assert group.values[0] == ("1", "9", "10")


# -- interruptions, and what is there


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_an_import_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    values = noise((48, 400, 300))
    path = tmp_path / "a.tif"
    write_tiff(path, values, metadata={"axes": "ZYX"}, compression="zlib")
    arguments = ["import", str(path), str(tmp_path / "a.zarr"), "--voxel-size", "0.3,0.1,0.1"]
    arguments += ["--workers", "0", "--memory", "405MB"]
    # The journal is written each second, and the ninth of twelve tasks does not end.
    slow = (
        "import itertools, time; from megaseg_dask.tools.importing import work; "
        "write = work.ImportWork._write\n"
        "numbers = itertools.count(1)\n"
        "def slowly(self, task, values):\n"
        "    write(self, task, values); time.sleep(600 if next(numbers) == 9 else 0.2)\n"
        "work.ImportWork._write = slowly\n"
        f"from megaseg_dask.cli.app import main; main({arguments!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", slow])
    while len(list(tmp_path.glob("a.zarr/0/c/*/*/*"))) < 9:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "a.zarr/zarr.json").exists()
    events = []
    settings = parse_settings({"workers": 0, "memory": "405MB"})
    import_files(
        [str(path)],
        str(tmp_path / "a.zarr"),
        ImportOptions(voxel_size=SIZE),
        settings,
        events.append,
    )
    assert events[0].n_done > 0
    imported(path, tmp_path / "other/a.zarr", settings, voxel_size=SIZE)
    assert files_of(tmp_path / "a.zarr") == files_of(tmp_path / "other/a.zarr")
    again = imported(path, tmp_path / "a.zarr", settings, voxel_size=SIZE).result
    assert again.already_done


# The second task of a worker does not end. A preload is executed twice.
HANG = """
import itertools, time
from megaseg_dask.tools.importing import work

write = getattr(work.ImportWork._write, "real", work.ImportWork._write)
numbers = itertools.count(1)

def hang(self, task, values):
    write(self, task, values)
    if next(numbers) == 2:
        time.sleep(600)

hang.real = write
work.ImportWork._write = hang
"""

IMPORT_THAT_HANGS = """
from megaseg_dask.cli.app import main
from megaseg_dask.run.cluster import dask_config

dask_config.CONFIG["distributed.worker.preload"] = [dask_config.WORKER_PRELOAD, {preload!r}]
if __name__ == "__main__":
    main({arguments!r})
"""


@pytest.mark.slow
def test_an_import_on_workers_that_was_killed_goes_on_to_the_same_bytes(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, noise((64, 700, 700)), metadata={"axes": "ZYX"}, compression="zlib")
    target = tmp_path / "a.zarr"
    arguments = ["import", str(path), str(target), "--voxel-size", "0.3,0.1,0.1"]
    arguments += ["--memory", "410MB", "--workers", "2"]
    script = tmp_path / "import.py"
    script.write_text(IMPORT_THAT_HANGS.format(preload=HANG, arguments=arguments))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    while len(list(target.glob("0/c/*/*/*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (target / "zarr.json").exists()
    subprocess.run([sys.executable, "-m", "megaseg_dask", *arguments], check=True)
    settings = parse_settings({"workers": 0, "memory": "410MB"})
    imported(path, tmp_path / "other/a.zarr", settings, voxel_size=SIZE)
    assert files_of(target) == files_of(tmp_path / "other/a.zarr")


def test_a_chunk_that_is_lost_is_written_again(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, noise((4, 300, 300)), metadata={"axes": "ZYX"})
    imported(path, tmp_path / "a.zarr", voxel_size=SIZE)
    before = files_of(tmp_path / "a.zarr")
    lost = next(path for path in (tmp_path / "a.zarr/0/c").rglob("*") if path.is_file())
    lost.unlink()
    assert not imported(path, tmp_path / "a.zarr", voxel_size=SIZE).result.already_done
    assert files_of(tmp_path / "a.zarr") == before


def test_nothing_that_exists_is_replaced(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, noise((4, 32, 32)), metadata={"axes": "ZYX"})
    foreign = tmp_path / "foreign.zarr"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(
        TargetError, match=r"has no record of its import\. An import does not replace"
    ):
        imported(path, foreign, voxel_size=SIZE)
    assert [child.name for child in foreign.iterdir()] == ["notes.txt"]
    imported(path, tmp_path / "a.zarr", voxel_size=SIZE)
    with pytest.raises(TargetError, match=r"imported with other options"):
        imported(path, tmp_path / "a.zarr", voxel_size=(1.0, 1.0, 1.0))
    write_tiff(path, noise((4, 32, 32), seed=1), metadata={"axes": "ZYX"})
    with pytest.raises(TargetError, match=r"imported before .*a\.tif changed"):
        imported(path, tmp_path / "a.zarr", voxel_size=SIZE)
    path.rename(tmp_path / "b.tif")
    with pytest.raises(TargetError, match=r"imported from other files"):
        imported(tmp_path / "b.tif", tmp_path / "a.zarr", voxel_size=SIZE)


# -- the command line


def test_other_commands_name_the_command_that_imports(tmp_path):
    path = tmp_path / "a.ome.tif"
    write_tiff(path, noise((4, 32, 32)), metadata={"axes": "ZYX"})
    for words in (
        ["segment", str(path), str(tmp_path / "b.zarr"), "--model", "starter"],
        ["plan", str(path), str(tmp_path / "b.zarr"), "--model", "starter"],
        ["view", str(path), "--no-browser"],
    ):
        found = CliRunner().invoke(build_app(), words)
        assert found.exit_code == 2
        assert f"megaseg import {path} {tmp_path}/a.ome.zarr" in found.output


def test_the_command_says_what_to_type_next(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, noise((4, 32, 32)), metadata={"axes": "ZYX"})
    words = ["import", str(path), str(tmp_path / "a.zarr"), "--voxel-size", "0.3,0.1,0.1"]
    found = CliRunner().invoke(build_app(), words)
    assert found.exit_code == 0
    assert "images       z 4 y 32 x 32, uint16, voxels 0.3 × 0.1 × 0.1 µm (z, y, x)" in found.output
    assert f"megaseg plan {tmp_path}/a.zarr {tmp_path}/a-segmented.ome.zarr" in found.output
    [*_, last] = CliRunner().invoke(build_app(), [*words, "--json"]).stdout.splitlines()
    assert json.loads(last)["already_done"]


def test_a_target_that_was_forgotten_is_named(tmp_path):
    first = tmp_path / "a.tif"
    last = tmp_path / "b.tif"
    for path in (first, last):
        write_tiff(path, noise((4, 32, 32)), metadata={"axes": "ZYX"})
    before = last.read_bytes()
    with pytest.raises(TargetError, match="is a file; the last argument is TARGET"):
        imported(first, last, voxel_size=SIZE)
    assert last.read_bytes() == before


def test_a_single_path_lacks_a_target(tmp_path):
    found = CliRunner().invoke(build_app(), ["import", "a.ome.tif"])
    assert found.exit_code == 2
    assert "TARGET is missing; write it last: megaseg import a.ome.tif a.ome.zarr" in found.output


def test_a_target_is_no_packed_image(tmp_path):
    path = tmp_path / "a.tif"
    write_tiff(path, noise((4, 32, 32)), metadata={"axes": "ZYX"})
    for name in ("a.ozx", "a.ome.zarr.zip"):
        with pytest.raises(TargetError, match=r"writes folders, .* choose a\.ome\.zarr"):
            imported(path, tmp_path / name, voxel_size=SIZE)
        words = ["plan", str(path), str(tmp_path / name), "--model", "starter"]
        assert "choose a.ome.zarr" in CliRunner().invoke(build_app(), words).output
        assert not (tmp_path / name).exists()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("harm", [cut, zero, Path.unlink])
@pytest.mark.parametrize("is_finished", [False, True])
def test_a_chunk_that_is_lost_short_or_replaced_is_imported_again(
    harm, is_finished, tmp_path, monkeypatch
):
    values = noise((8, 300, 300))
    write_tiff(tmp_path / "image.tif", values)
    options = {"axes": "ZYX", "voxel_size": SIZE}

    def stop_before_levels(self, stage, index, run_task=ImportWork.run_task):
        if stage != "import" and not is_finished:
            raise KeyboardInterrupt
        return run_task(self, stage, index)

    with (
        monkeypatch.context() as patch,
        nullcontext() if is_finished else pytest.raises(KeyboardInterrupt),
    ):
        patch.setattr(ImportWork, "run_task", stop_before_levels)
        imported(tmp_path / "image.tif", tmp_path / "image.zarr", **options)
    harm(next(path for path in (tmp_path / "image.zarr/0/c").rglob("*") if path.is_file()))
    clear_array_cache()
    done = imported(tmp_path / "image.tif", tmp_path / "image.zarr", **options)
    assert (done.result.status, done.result.already_done) == ("done", False)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "image.zarr/0")[...], values)
    done = imported(tmp_path / "image.tif", tmp_path / "image.zarr", **options)
    assert done.result.already_done


@pytest.mark.parametrize("harm", [cut, Path.unlink])
def test_metadata_of_a_finished_import_that_are_lost_or_damaged_are_written_again(harm, tmp_path):
    for well in ("A1", "B2"):
        write_tiff(tmp_path / f"{well}.tif", noise((4, 32, 32)), metadata={"axes": "ZYX"})
    files = sorted(tmp_path.glob("*.tif"))
    target = tmp_path / "plate.zarr"
    imported(files, target, pattern="{well}.tif", voxel_size=SIZE)
    for name in ("zarr.json", "B/2/zarr.json", "A/1/0/zarr.json", "B/2/0/0/zarr.json"):
        written = (target / name).read_bytes()
        harm(target / name)
        done = imported(files, target, pattern="{well}.tif", voxel_size=SIZE)
        assert not done.result.already_done, name
        assert json.loads((target / name).read_bytes()) == json.loads(written)
    assert imported(files, target, pattern="{well}.tif", voxel_size=SIZE).result.already_done

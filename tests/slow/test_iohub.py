"""Plates that iohub itself wrote are segmented as they are, and ours are read by iohub and ngio.

iohub needs other libraries than this package: each version has an environment of its own, in the
folder that MEGASEG_IOHUB names. It is made there, with pip, if it is not there yet.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.plan.settings import parse_settings
from tests.fixtures.images import write_image
from tests.fixtures.runs import segment_here

SCRIPTS = Path(__file__).parents[1] / "fixtures/iohub"
# 0.3 needs Python 3.12, which MEGASEG_IOHUB_PYTHON may name.
RELEASES = {"0.2.3": sys.executable, "0.3.11": os.environ.get("MEGASEG_IOHUB_PYTHON", "python3.12")}
WRITERS = [("0.2.3", "0.4"), ("0.3.11", "0.4"), ("0.3.11", "0.5")]
DONE = ["A/1/0", "A/2/0", "B/1/0"]
ODD = {"B/1/1": "too small", "B/2/0": "no such channel"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "MEGASEG_IOHUB" not in os.environ,
        reason="MEGASEG_IOHUB names no folder for environments with iohub",
    ),
]


def iohub(release: str, script: str, *arguments: object) -> str:
    """Run a script with a release of iohub, and return what it prints."""
    folder = Path(os.environ["MEGASEG_IOHUB"]) / release
    python = folder / "bin/python"
    if not python.exists():
        made = [RELEASES[release], "-m", "venv", str(folder)]
        installed = [str(python), "-m", "pip", "install", "--quiet", f"iohub=={release}"]
        for command in (made, installed):
            subprocess.run(command, check=True, capture_output=True)
    command = [str(python), str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(release: str, plate: Path, folder: Path) -> dict[str, dict]:
    """What iohub finds in a plate: metadata and voxels of each field."""
    folder.mkdir(exist_ok=True)
    found = json.loads(iohub(release, "read.py", plate, folder))
    for place, field in found.items():
        field["voxels"] = np.load(folder / f"{place.replace('/', '-')}.npy")
    return found


@pytest.fixture(scope="module", params=WRITERS, ids=lambda pair: f"iohub {pair[0]}, {pair[1]}")
def source(request, tmp_path_factory) -> tuple[str, Path]:
    release, version = request.param
    path = tmp_path_factory.mktemp("iohub") / "plate.zarr"
    iohub(release, "write.py", path, version)
    return release, path


@pytest.mark.parametrize("place", ["in place", "0.4", "0.5"])
def test_a_plate_of_iohub(place, source, tmp_path, tiny_bundle):
    import ngio

    release, original = source
    plate = shutil.copytree(original, tmp_path / "plate.zarr")
    options = {"model": str(tiny_bundle), "channel": "GFP", "patch": "16,32,32", "overlap": 0}
    shared = {**options, "scores_dtype": "float32", "threads": 1}
    target = plate
    if place == "in place":
        settings = parse_settings({**shared, "outputs": "labels"})
    else:
        target = tmp_path / "out.zarr"
        settings = parse_settings({**shared, "ome_zarr": place})
    result = segment_here(str(plate), str(target), settings)
    reasons = {failure.volume: failure.error for failure in result.failures}
    assert reasons.keys() == ODD.keys()
    for path, words in ODD.items():
        assert words in reasons[path]

    stored = read(release, plate, tmp_path / "stored")
    assert [stored[path]["channels"].index("GFP") for path in DONE] == [1, 0, 1]
    for path in DONE:
        field = stored[path]
        volume = field["voxels"][0, field["channels"].index("GFP")]
        alone = write_image(tmp_path / "alone.zarr", volume)
        one = parse_settings({**shared, "channel": None, "overwrite": True})
        assert segment_here(str(alone), str(tmp_path / "alone-out.zarr"), one).status == "done"
        expected = zarr.open_group(tmp_path / "alone-out.zarr", mode="r")
        found = zarr.open_group(target / path, mode="r")
        labels = expected["labels/megaseg/0"][:]
        assert_array_equal(found["labels/megaseg/0"][0], labels)
        if place != "in place":
            field["scores"] = expected["0"][:]
            field["labels"] = labels
    if place == "in place":
        # The plate is to iohub what it was.
        before = read(release, original, tmp_path / "before")
        for path, field in before.items():
            assert_array_equal(stored[path].pop("voxels"), field.pop("voxels"))
        assert stored == before
        return

    opened = read("0.3.11", target, tmp_path / "opened")
    assert list(opened) == DONE
    for path in DONE:
        ours = opened[path]
        assert ours["axes"] == ["t", "z", "y", "x"]
        assert_array_equal(ours["voxels"][0], stored[path]["scores"])
        for name in ("scale", "translation"):
            assert_allclose(ours[name][1:], stored[path][name][2:])
        container = ngio.open_ome_zarr_container(target / path, mode="r")
        assert_array_equal(container.get_image().get_as_numpy()[0], stored[path]["scores"])
        label = container.get_label("megaseg")
        assert_array_equal(label.get_as_numpy()[0], stored[path]["labels"])
        assert_allclose([label.pixel_size.z, label.pixel_size.y], stored[path]["scale"][2:4])
    plate_of_ngio = ngio.open_ome_zarr_plate(target, mode="r")
    assert sorted(plate_of_ngio.images_paths(max_workers=1)) == DONE

"""The plugin for napari: its manifest, what its reader opens, and a run of its panel, offscreen."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import megaseg_dask
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

pytestmark = [
    pytest.mark.slow,
    # The libraries of napari, not ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
MANIFEST = Path(megaseg_dask.__file__).parent / "tools/napari/napari.yaml"
SPACING_UM = {"z": 0.5, "y": 0.2, "x": 0.25}
# A task of a worker that starts on a busy machine.
MAX_RUN_S = 240


@pytest.fixture(scope="module", autouse=True)
def napari_offscreen():
    """An application of Qt without a screen; each test is skipped where there is no napari."""
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    pytest.importorskip("napari", reason="napari is not installed: make test-slow installs it")
    try:
        from napari.qt import get_qapp
    except ImportError as error:
        pytest.skip(f"Qt cannot be loaded ({error}): apt-get install libegl1 libxkbcommon0")
    return get_qapp()


@pytest.fixture
def viewer():
    """A viewer without a window, which would need OpenGL, and the plugin as it is installed."""
    from napari.components import ViewerModel
    from npe2 import PluginManager, PluginManifest

    manager = PluginManager.instance()
    manager.register(PluginManifest.from_file(MANIFEST), warn_disabled=False)
    yield ViewerModel()
    manager.unregister("megaseg-dask")


@pytest.fixture
def cells(tmp_path) -> Path:
    """Two channels of two timepoints, with their names."""
    voxels = np.stack([[blobs((16, 32, 40), 2 * t + c) for c in range(2)] for t in range(2)])
    scale = {"t": 60.0, "c": 1.0, **SPACING_UM}
    path = tmp_path / "cells.zarr"
    return write_image(path, voxels, axes="tczyx", scale=scale, channels=["DNA", "actin"])


def test_the_manifest_is_valid_and_names_what_is_there():
    from npe2 import PluginManifest

    manifest = PluginManifest.from_file(MANIFEST)
    manifest.validate_imports()
    assert manifest.name == "megaseg-dask"


def test_an_image_opens_by_channel_with_names_sizes_and_units(cells, viewer):
    import zarr

    [dna, actin] = viewer.open(str(cells), plugin="megaseg-dask")
    assert [dna.name, actin.name] == ["cells DNA", "cells actin"]
    stored = zarr.open_array(cells / "0", mode="r")[...]
    assert_array_equal(np.asarray(dna.data), stored[:, 0])
    assert_array_equal(np.asarray(actin.data), stored[:, 1])
    assert tuple(dna.scale[1:]) == tuple(SPACING_UM.values())
    assert list(map(str, dna.units[1:])) == ["micrometer"] * 3
    assert dna.axis_labels == ("t", "z", "y", "x")


def test_a_target_opens_over_its_image(cells, tiny_bundle, viewer, tmp_path):
    options = {
        "model": str(tiny_bundle),
        "channel": "actin",
        "threshold": "otsu",
        "engine": "torch",
        "threads": 1,
    }
    target = tmp_path / "out.zarr"
    segment_here(str(cells), str(target), parse_settings(options))
    layers = viewer.open(str(target), plugin="megaseg-dask")
    shown = {layer.name: layer.visible for layer in layers}
    assert shown == {"out actin": True, "out scores": False, "out labels megaseg": True}
    for layer in layers:
        assert tuple(layer.scale[-3:]) == tuple(SPACING_UM.values())


def test_each_field_of_a_plate_opens_and_one_by_its_own_path(viewer, tmp_path):
    path = tmp_path / "plate.zarr"
    fields = (Field("A", "1", "0"), Field("B", "2", "0"))
    write_plate(Location.of(path), Plate("0.5", "p", ("A", "B"), ("1", "2"), fields), "0.5")
    for field in fields:
        write_image(path / field.path, blobs((16, 32, 40)), scale=SPACING_UM)
    layers = viewer.open(str(path), plugin="megaseg-dask")
    assert [layer.name for layer in layers] == ["p A/1/0", "p B/2/0"]
    assert [layer.visible for layer in layers] == [True, False]
    viewer.layers.clear()
    [one] = viewer.open(str(path / "B/2/0"), plugin="megaseg-dask")
    assert one.name == "p B/2/0"


def test_other_folders_are_left_to_other_readers(cells, tmp_path):
    from megaseg_dask.tools.napari.reader import find_reader

    assert find_reader(str(cells)) is not None
    assert find_reader(str(tmp_path)) is None
    assert find_reader([str(cells), str(tmp_path / "none.tif")]) is None


def test_the_panel_segments_and_says_what_is_wrong(
    cells, tiny_bundle, viewer, napari_offscreen, tmp_path, monkeypatch
):
    from megaseg_dask.tools.napari.panel import SegmentPanel

    panel = SegmentPanel(viewer)
    panel.button.click()
    assert "Open an OME-Zarr image first" in panel.message.text()

    viewer.open(str(cells), plugin="megaseg-dask")
    panel.image.setCurrentText("cells actin")
    panel.model.setCurrentText(str(tiny_bundle))
    panel.target.setText(str(tmp_path / "out.zarr"))
    panel.threshold.setText("seven")
    panel.button.click()
    assert "threshold" in panel.message.text()
    assert not (tmp_path / "out.zarr").exists()

    heard = set()
    show = panel.message.setText

    def hear(text: str) -> None:
        # On a busy machine several texts come one after the other, before anybody looks.
        heard.add(text)
        show(text)

    monkeypatch.setattr(panel.message, "setText", hear)
    panel.threshold.setText("otsu")
    panel.button.click()
    end_s = time.monotonic() + MAX_RUN_S
    while panel.button.text() == "Stop":
        assert time.monotonic() < end_s
        napari_offscreen.processEvents()
        time.sleep(0.01)
    assert "segmenting volumes: 2 of 2" in heard
    assert "done after" in panel.message.text()
    added = viewer.layers["out labels megaseg"]
    written = megaseg_dask.open_image(tmp_path / "out.zarr")["labels/megaseg/0/image"]
    assert_array_equal(np.asarray(added.data), written.values)
    assert added.data.max() > 0

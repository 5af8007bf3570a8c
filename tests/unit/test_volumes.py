"""Writing: a task owns the write units of its box, whatever lies there."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from megaseg_dask.geometry import BlockGrid, Box
from megaseg_dask.layout import write_layout
from megaseg_dask.ngff.images import Axis, Image, Level
from megaseg_dask.ngff.volumes import Volume, create_array
from megaseg_dask.stores import Location

SHAPE, BLOCK = (17, 63, 141), (17, 40, 64)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("torn", [lambda data: b"", lambda data: b"junk", lambda data: data[: len(data) // 2],
                                  lambda data: bytes(len(data))])  # fmt: skip
def test_what_a_power_loss_tore_is_written_anew(version, torn, tmp_path):
    image = Image(version, "", tuple(map(Axis, "zyx")), (Level("0", SHAPE, (), ()),), "uint8")
    layout = replace(write_layout(SHAPE, BLOCK, sharded=version == "0.5"), chunk_shape=(17, 20, 32))
    create_array(Location(str(tmp_path)), image, 0, "uint8", layout, version)
    volume, blocks = Volume(Location(str(tmp_path)), ("z", "y", "x")), BlockGrid(SHAPE, BLOCK)
    values = np.random.default_rng(0).integers(1, 255, SHAPE, np.uint8)
    for core in blocks:
        volume.write(core, values[core.slices])
    objects = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith((".z", "zarr."))]
    assert len(objects) >= len(blocks)
    for path in objects:
        path.write_bytes(torn(path.read_bytes()))
    for core in blocks:
        volume.write(core, values[core.slices])
    assert_array_equal(volume.read(Box.of(SHAPE)), values)

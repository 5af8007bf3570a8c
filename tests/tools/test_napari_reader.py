"""What the reader for napari gives, without napari."""

import numpy as np
import pytest

from megaseg_dask.ngff.image import read_image
from megaseg_dask.stores import Location
from megaseg_dask.tools.napari.reader import read
from tests.fixtures.images import write_image


@pytest.mark.parametrize("is_marked", [True, False])
def test_an_image_that_is_marked_as_labels_opens_as_labels(tmp_path, is_marked):
    path = write_image(tmp_path / "truth.zarr", np.ones((16, 32, 32), np.uint16), axes="zyx")
    if is_marked:
        document = path / "zarr.json"
        text = document.read_text()
        document.write_text(text.replace('"ome": {', '"ome": {"image-label": {}, ', 1))
    assert (read_image(Location.of(path)).kind == "label image") == is_marked
    [layer] = read(str(path))
    assert layer.type == ("labels" if is_marked else "image")
    assert ("contrast_limits" in layer.options) != is_marked

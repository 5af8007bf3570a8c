import pytest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.fixtures.chromium import Page, find_chromium
from tests.fixtures.images import blobs, write_image


@pytest.fixture
def browser(tmp_path):
    """A page of a real browser."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    page = Page(program, tmp_path / "browser")
    yield page
    page.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory, tiny_bundle, client):
    """An image with two timepoints, segmented in blocks."""
    import numpy as np

    folder = tmp_path_factory.mktemp("seen")
    image = np.stack([blobs((32, 64, 80), seed=t) for t in range(2)])
    write_image(
        folder / "image.zarr", image, axes="tzyx", scale={"t": 1.0, "z": 0.5, "y": 0.2, "x": 0.2}
    )
    options = {
        "model": str(tiny_bundle),
        "threads": 1,
        "overlap": 0,
        "block": "16,32,40",
        "threshold": "otsu",
    }
    result = segment(
        str(folder / "image.zarr"), str(folder / "out.zarr"), parse_settings(options), client=client
    )
    assert result.status == "done"
    return folder / "out.zarr"

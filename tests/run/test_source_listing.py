"""What a run reads is listed on each kind of store: a chunk that changes is seen, and no other."""

import zipfile

import numpy as np
import pytest
import zarr

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.source_listing import list_reads
from megaseg_dask.stores.arrays import clear_array_cache
from tests.fixtures.images import blobs, write_image
from tests.fixtures.servers import range_server
from tests.stores.test_runs import upload
from tests.stores.test_zipped import pack

SHAPE = (16, 24, 24)


@pytest.fixture
def image(tmp_path):
    values = np.stack([blobs(SHAPE, t) for t in range(2)])
    return write_image(tmp_path / "image.zarr", values, axes="tzyx", chunks=(1, 16, 12, 24))


def change(image):
    array = zarr.open_array(image / "0", mode="r+")
    array[1, 0, 0, 0] = array[1, 0, 0, 0] + 1


@pytest.mark.parametrize("store", ["disk", "bucket", "zip", "web"])
def test_a_chunk_that_changes_is_seen(store, image, tmp_path, tiny_bundle, request):
    def place():
        match store:
            case "bucket":
                request.getfixturevalue("s3")
                return upload(image, f"{request.getfixturevalue('bucket_folder')}/image.zarr")
            case "zip":
                return str(pack(image, tmp_path / "image.ozx", method=zipfile.ZIP_STORED))
        return str(image)

    settings = parse_settings({"model": str(tiny_bundle), "threads": 1})
    with range_server(tmp_path) as url:
        source = f"{url}/image.zarr" if store == "web" else place()
        [(plan, _)] = plan_runs(source, str(tmp_path / "out.zarr"), settings)
        before = list_reads(plan, is_needed=True)
        if store == "web":
            # A web server lists nothing.
            assert before.volumes == (None, None)
            assert before.text == ""
            return
        assert before.text
        assert list_reads(plan, is_needed=True) == before
        change(image)
        place()
        clear_array_cache()
        now = list_reads(plan, is_needed=True)
    assert before.changed(now) == [1]
    assert before.refreshed(now, [1]) == now

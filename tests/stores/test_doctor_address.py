"""What ``megaseg doctor`` says of addresses in a real S3 server and on a web server."""

import numpy as np
import pytest

from megaseg_dask.stores import Location, clear_store_caches
from megaseg_dask.tools.doctor.address import Finding, check_address
from tests.fixtures.images import blobs, write_image
from tests.fixtures.servers import range_server
from tests.stores.test_runs import upload


def examine(address: str) -> tuple[list[Finding], str]:
    found = list(check_address(address))
    return found, "\n".join(f"{f.text} {f.advice}" for f in found)


def test_source_and_target_in_a_bucket(s3, folder, tmp_path):
    local = write_image(
        tmp_path / "image.zarr", blobs((16, 40, 44)).astype(np.uint16), chunks=(16, 20, 22)
    )
    found, text = examine(upload(local, f"{folder}/image.zarr"))
    assert not any(f.is_fatal for f in found)
    assert "z 16, y 40, x 44; uint16" in text
    assert "can be read: " in text
    keys = Location.of(folder).keys("")
    found, text = examine(f"{folder}/out.zarr")
    assert not any(f.is_fatal for f in found)
    assert "does not exist yet" in text
    assert "MB/s" in text or "kB/s" in text
    assert "protects a run from a second one" in text
    # What was tried is gone again.
    assert Location.of(folder).keys("") == keys


@pytest.mark.parametrize(
    ("variables", "address", "expected"),
    [
        (
            {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
            "s3://private/out.zarr",
            "check AWS_ACCESS_KEY_ID",
        ),
        ({}, "s3://no-such-bucket/out.zarr", "there is no such bucket"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "s3://private/out.zarr",
            "check that the store is running",
        ),
    ],
)
def test_what_is_wrong_has_its_next_step(s3, variables, address, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    clear_store_caches()
    found, text = examine(address)
    assert found[-1].is_fatal
    assert expected in text
    assert "wrong-secret" not in text


def test_a_web_server_is_for_reading(tmp_path):
    write_image(tmp_path / "image.zarr", blobs((16, 40, 44)))
    with range_server(tmp_path) as url:
        found, text = examine(f"{url}/image.zarr")
    assert not any(f.is_fatal for f in found)
    assert "can be read: " in text
    assert "write access not tested" in text

"""Report and viewer of a run whose source and target live in a real S3 server."""

import asyncio
from urllib.parse import urlsplit

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.write import write_report
from megaseg_dask.tools.view.gallery import Gallery
from megaseg_dask.tools.view.server import Server
from tests.fixtures.images import blobs, write_image
from tests.stores.test_runs import upload

pytestmark = pytest.mark.slow


def test_report_and_viewer_of_a_run_in_a_bucket(s3, folder, tmp_path, tiny_bundle):
    local = write_image(tmp_path / "image.zarr", blobs((40, 60, 90)), chunks=(20, 30, 45))
    source, target = upload(local, f"{folder}/image.zarr"), f"{folder}/out.zarr"
    options = {
        "model": str(tiny_bundle),
        "threads": 1,
        "block": "20,30,50",
        "overlap": 0,
        "outputs": "labels,scores,measurements",
    }
    assert segment(source, target, parse_settings(options)).status == "done"

    place = write_report(target)
    assert place.url == f"{target}.report.html"
    text = (place.parent.get(place.basename) or b"").decode()
    assert "none of them has" in " ".join(text.replace("\n", " ").split())
    assert "cannot be read" not in text

    layers = Gallery(target).scene("").layers
    assert [layer.name for layer in layers] == ["image", "labels megaseg", "scores"]

    async def read() -> list[tuple[int, bytes]]:
        server = Server(tmp_path)
        try:
            urls = [f"{server.publish(layer.location)}/{key}" for layer, key in wanted]
            assert {urlsplit(url).hostname for url in urls} == {"127.0.0.1"}
            asked = [HTTPRequest(url, headers={"Range": "bytes=-16"}) for url in urls]
            return [((answer := await AsyncHTTPClient().fetch(r)).code, answer.body) for r in asked]
        finally:
            server.close()

    wanted = [(layer, next(k for k in layer.location.keys("0/c") if k)) for layer in layers]
    whole = [Location(f"{layer.location}").get(key) for layer, key in wanted]
    assert asyncio.run(read()) == [(206, data[-16:]) for data in whole]

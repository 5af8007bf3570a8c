"""The viewer's server.

Objects in parts, to the one who has the address alone; and what a scene is made of.
"""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.gallery import Gallery
from megaseg_dask.tools.view.neuroglancer_state import state_of
from megaseg_dask.tools.view.page import axes_of, layers_of
from megaseg_dask.tools.view.server import Server
from megaseg_dask.tools.view.viewer import view
from tests.fixtures.images import blobs, write_image
from tests.ngff.test_coordinate_systems import as_06
from tests.stores.test_zipped import pack


class Urls:
    """Where a server would have what is drawn."""

    def of(self, layer):
        return f"http://here/{layer.name}"

    def backdrop_of(self, scene):
        return "http://here/backdrop"

    def outlines_of(self, layer):
        return f"http://here/outlines/{layer.name}"

    def meshes_of(self, layer, t):
        return f"http://here/meshes/{layer.name}/{t}"


def count(question):
    """Answer a question of the page."""
    return {"counted": question["n"] + 1}


def ask(folder: Path | str, *requests: tuple[str, dict]) -> list[tuple[int, dict, bytes]]:
    """Start a server of one folder, send requests below its address, and return the answers."""

    async def run():
        server = Server(Path(folder))
        server.answer("count", count)
        try:
            base = server.publish(Location.of(folder))
            assert server.publish(Location.of(folder)) == base
            return [await send(server, base, path, options) for path, options in requests]
        finally:
            server.close()

    async def send(server, base, path, options):
        url = path.format(data=base, page=server.url, host=server.host)
        answer = await AsyncHTTPClient().fetch(HTTPRequest(url, **options), raise_error=False)
        return answer.code, dict(answer.headers), answer.body

    return asyncio.run(run())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data/c/0").mkdir(parents=True)
    (tmp_path / "data/c/0/1").write_bytes(bytes(range(100)))
    (tmp_path / "secret").write_bytes(b"secret")
    return tmp_path / "data"


PARTS = [
    ("bytes=0-9", 0, 10),
    ("bytes=90-", 90, 100),
    ("bytes=-7", 93, 100),
    ("bytes=95-400", 95, 100),
]


@pytest.mark.parametrize(("wanted", "start", "stop"), PARTS)
def test_parts(folder, wanted, start, stop):
    ((code, headers, body),) = ask(folder, ("{data}/c/0/1", {"headers": {"Range": wanted}}))
    assert (code, body) == (206, bytes(range(start, stop)))
    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/100"
    # No page of another origin may read it.
    assert "Access-Control-Allow-Origin" not in headers


def test_whole_head_missing_and_beyond(folder):
    whole, head, missing, directory, beyond = ask(
        folder,
        ("{data}/c/0/1", {}),
        ("{data}/c/0/1", {"method": "HEAD"}),
        ("{data}/c/0/2", {}),
        ("{data}/c/0", {}),
        ("{data}/c/0/1", {"headers": {"Range": "bytes=100-"}}),
    )
    assert whole[::2] == (200, bytes(range(100)))
    assert (head[0], head[1]["Content-Length"], head[2]) == (200, "100", b"")
    assert missing[0] == 404
    assert directory[0] in (404, 502)
    assert beyond[0] == 416


def test_nobody_else_and_nothing_else(folder):
    answers = ask(
        folder,
        ("{data}/../secret", {}),
        ("{data}/%2e%2e/secret", {}),
        ("{data}/c/../../secret", {}),
        ("{data}/%2Fetc/passwd", {}),
        ("{data}/..%5csecret", {}),
        ("http://{host}/ask/count", {"method": "POST", "body": "{{}}"}),
        ("http://{host}/", {}),
        ("{page}/server.py", {}),
        ("{page}/v/1/../secret", {}),
        ("{page}/v/1/zarr.json", {}),
        ("http://{host}/data/0/c/0/1", {}),
        ("{page}/data/1/c/0/1", {}),
        ("{data}/c/0/1", {"headers": {"Host": "evil.example:80"}}),
        ("{page}/", {"headers": {"Host": "localhost.evil.example"}}),
        ("{data}/c/0/1", {"headers": {"Origin": "http://evil.example"}}),
        ("{page}/ask/count", {"method": "POST", "body": "no json"}),
        ("{page}/ask/count", {"method": "POST", "body": "{{}}"}),
    )
    assert [code for code, _, _ in answers] == [404] * 12 + [403] * 3 + [400] * 2
    assert not any(b"secret" in body and b"html" not in body for _, _, body in answers)


def test_the_page_and_its_questions(folder):
    (folder / "index.html").write_text("<p>drawing</p>")
    page, script, style, drawing, answer = ask(
        folder,
        ("{page}/", {}),
        ("{page}/page.js", {}),
        ("{page}/page.css", {}),
        ("{page}/v/1/", {}),
        ("{page}/ask/count", {"method": "POST", "body": '{"n": 1}'}),
    )
    assert b"page.js" in page[2]
    assert page[1]["Content-Type"] == "text/html; charset=utf-8"
    assert script[1]["Content-Type"] == "text/javascript; charset=utf-8"
    assert style[1]["Content-Type"] == "text/css; charset=utf-8"
    # Neither may load anything from another machine, and the page runs no script inside it.
    assert "default-src 'self'" in page[1]["Content-Security-Policy"]
    assert "unsafe" not in page[1]["Content-Security-Policy"]
    assert "connect-src 'self' data: blob:" in drawing[1]["Content-Security-Policy"]
    for _, _, text in (page, script, style):
        assert b"http://" not in text
        assert b"https://" not in text
    assert drawing[2] == b"<p>drawing</p>"
    assert json.loads(answer[2]) == {"counted": 2}


def test_objects_made_on_request_and_failures_are_answers(folder):
    class Made:
        def get(self, key):
            if key == "broken":
                raise SourceError("a chunk is lost")
            return key.encode() if key == "1:0" else None

    async def run():
        server = Server(folder)
        try:
            url = server.publish_made("meshes", Made())
            assert server.publish_made("meshes", Made()) == url
            client = AsyncHTTPClient()
            keys = ("1:0", "2:0", "broken")
            found = [await client.fetch(f"{url}/{key}", raise_error=False) for key in keys]
            return [(answer.code, answer.body) for answer in found]
        finally:
            server.close()

    made, missing, broken = asyncio.run(run())
    assert made == (200, b"1:0")
    assert missing[0] == 404
    assert broken == (502, b"a chunk is lost")


def test_channels_without_colours_are_not_shown_to_neuroglancer(tmp_path):
    image = write_image(tmp_path / "a.zarr", blobs((1, 16, 20, 24)), axes="czyx", channels=["DNA"])
    ((_, _, body),) = ask(image, ("{data}/zarr.json", {}))
    served, stored = (
        json.loads(body)["attributes"]["ome"],
        json.loads((image / "zarr.json").read_text())["attributes"]["ome"],
    )
    assert "omero" in stored
    assert served == {name: part for name, part in stored.items() if name != "omero"}


def test_an_image_of_06_in_a_zip_is_served_as_one_of_05(tmp_path):
    data = blobs((8, 32, 32))
    path = write_image(tmp_path / "a.zarr", data, data[:, ::2, ::2])
    before = json.loads((path / "zarr.json").read_text())["attributes"]["ome"]
    packed = pack(as_06(path), tmp_path / "a.ozx")
    (_, _, group), (code, _, chunk) = ask(
        packed, ("{data}/zarr.json", {}), ("{data}/0/c/0/0/0", {})
    )
    served = json.loads(group)["attributes"]["ome"]
    (expected,) = before["multiscales"]
    assert served["version"] == "0.5"
    for dataset in served["multiscales"][0]["datasets"]:
        for transform in dataset["coordinateTransformations"]:
            transform.pop("input", None)
    assert served["multiscales"] == [expected]
    assert (code, chunk) == (200, (path / "0/c/0/0/0").read_bytes())


@pytest.fixture(params=["0.4", "0.5"])
def image(request, tmp_path):
    path = write_image(
        tmp_path / "cells.zarr",
        np.stack(
            [[blobs((16, 40, 44), seed=10 * t + c) + 100 * c for c in range(2)] for t in range(3)]
        ),
        axes="tczyx",
        version=request.param,
        scale={"t": 30.0, "z": 0.5, "y": 0.2, "x": 0.2},
        channels=["DNA", "actin"],
    )
    write_image(
        path / "labels/nuclei",
        np.ones((3, 16, 40, 44), np.uint8),
        axes="tzyx",
        version=request.param,
    )
    labels = zarr.open_group(
        path / "labels", mode="a", zarr_format=2 if request.param == "0.4" else 3
    )
    labels.attrs.update(
        {"labels": ["nuclei"]} if request.param == "0.4" else {"ome": {"labels": ["nuclei"]}}
    )
    return path


def test_a_scene_of_an_image_with_labels(image):
    gallery = Gallery(str(image))
    scene = gallery.scene("")
    assert [layer.name for layer in scene.layers] == ["DNA", "actin", "labels nuclei"]
    assert scene.extents == {"x": 44, "y": 40, "z": 16, "t": 3}
    assert scene.dimensions["z"] == (pytest.approx(5e-7), "m")
    assert scene.dimensions["t"] == (30.0, "s")
    low, high = scene.layers[0].limits
    assert 0 <= low < high <= blobs((16, 40, 44)).max()
    state = state_of(scene, Urls())
    driver = {"0.4": "zarr2", "0.5": "zarr3"}[scene.layers[0].image.version]
    layers = {layer["name"]: layer for layer in state["layers"]}
    assert [layers[number]["source"] for number in "012"] == [
        f"http://here/{name}/|{driver}:" for name in ("DNA", "actin", "labels nuclei")
    ]
    assert [layers[number].get("localPosition") for number in "012"] == [[0], [1], None]
    # Selected and hidden objects are those of the labels.
    assert layers["2:outlines"]["linkedSegmentationGroup"] == "2"
    assert layers["2:meshes"]["source"]["transform"]["inputDimensions"]["z"] == [
        pytest.approx(1e-6),
        "m",
    ]
    json.dumps(state)


def test_controls_of_a_scene(image):
    scene = Gallery(str(image)).scene("")
    axes = {axis.name: axis for axis in axes_of(scene)}
    assert (axes["z"].n, axes["z"].first, axes["z"].unit) == (16, 0.0, "m")
    assert (axes["t"].n, axes["t"].scale, axes["t"].unit) == (3, 30.0, "s")
    layers = layers_of(scene)
    assert [layer.kind for layer in layers] == ["image", "image", "labels"]
    assert [layer.span is None for layer in layers] == [False, False, True]


def test_a_plate_has_its_fields_and_what_is_broken_is_left_out(tmp_path):
    fields = tuple(Field("A", column, "0") for column in "12")
    write_plate(
        Location.of(tmp_path / "p.zarr"), Plate("0.5", "screen", ("A",), ("1", "2"), fields), "0.5"
    )
    write_image(tmp_path / "p.zarr/A/1/0", blobs((16, 20, 24)))
    gallery = Gallery(str(tmp_path / "p.zarr"))
    assert gallery.fields == ["A/1/0", "A/2/0"]
    assert gallery.scene("A/1/0").layers[0].name == "image"
    with pytest.raises(SourceError, match="A/2/0"):
        gallery.scene("A/2/0")


def test_wrong_requests(tmp_path, monkeypatch, image):
    with pytest.raises(SourceError, match="does not exist"):
        Gallery(str(tmp_path / "nothing.zarr"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="no OME-Zarr image"):
        Gallery(str(tmp_path / "empty")).scene("")
    monkeypatch.setitem(__import__("sys").modules, "neuroglancer", None)
    with pytest.raises(SettingsError, match="pip install 'neuroglancer"):
        view(str(image), None, print)

"""The viewer while it predicts: its server, its queue, and what it takes from the page."""

import asyncio
import json
import threading

import numpy as np
import pytest
import zarr
from skimage.measure import label
from tornado.httpclient import AsyncHTTPClient, HTTPRequest

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.looking import Looking
from megaseg_dask.tools.view import prediction
from megaseg_dask.tools.view.live import Live, LiveGallery, finest_shown
from megaseg_dask.tools.view.prediction import Key, Scores, Sight, Waiting, WaitingList
from megaseg_dask.tools.view.server import Server
from megaseg_dask.tools.view.threshold import View, count_in_view
from megaseg_dask.tools.view.viewer import Published, Session
from tests.cli.test_imports import run
from tests.fixtures.images import blobs, write_image
from tests.fixtures.looking import WAIT_S, viewing
from tests.fixtures.runs import segment_here

PAGE = "http://127.0.0.1:1"
SCALE = {"t": 1.0, "z": 0.5, "y": 0.2, "x": 0.2}


@pytest.fixture
def source(tmp_path):
    image = np.stack([blobs((24, 64, 96), seed=t) for t in range(2)])
    return write_image(
        tmp_path / "image.zarr", image, image[..., ::2, ::2], axes="tzyx", scale=SCALE
    )


@pytest.fixture
def settings(tiny_bundle, cheap_engine):
    return parse_settings({"model": str(tiny_bundle), "engine": "torch", "threads": 1})


def ask(source, settings, *requests):
    """Start the viewer, send requests, and return status, headers and body of each answer."""

    async def send(url, options):
        options = {"headers": {"Origin": PAGE}, **options}
        answer = await AsyncHTTPClient().fetch(HTTPRequest(url, **options), raise_error=False)
        return answer.code, dict(answer.headers), answer.body

    async def talk(live, gallery):
        server = Server(source)
        server.host = PAGE.removeprefix("http://")
        try:
            session = Session(gallery, live.attach(server, Published(server)))
            layer = session.scene({})["state"]["layers"][-1]["source"]
            base = layer.partition("|")[0].rstrip("/")
            origin = "/".join(base.split("/")[:3])
            return [
                await send(path.format(scores=base, origin=origin), options)
                for path, options in requests
            ]
        finally:
            server.close()

    looking = Looking(str(source), None, settings)
    with looking.open():
        gallery = LiveGallery(str(source), looking)
        live = Live(gallery, looking)
        try:
            return asyncio.run(talk(live, gallery))
        finally:
            live.close()


def test_scores_are_served_to_the_page_alone(source, settings, tmp_path):
    segment_here(str(source), str(tmp_path / "out.zarr"), settings)
    group, array, chunk, coarse, *wrong = ask(
        source,
        settings,
        ("{scores}/zarr.json", {}),
        ("{scores}/0/zarr.json", {}),
        ("{scores}/0/c/1/0/0/1", {}),
        ("{scores}/1/c/0/0/0/0", {}),
        ("{scores}/2/zarr.json", {}),
        ("{scores}/0/c/2/0/0/0", {}),
        ("{scores}/0/c/0/0/0/9", {}),
        ("{scores}/0/c/0/0/0", {}),
        ("{scores}/../../etc/passwd", {}),
        ("{origin}/0/0/zarr.json", {}),
        ("{scores}/zarr.json", {"headers": {"Origin": "http://evil.example"}}),
        ("{scores}/zarr.json", {"headers": {"Host": "evil.example"}}),
    )
    written = zarr.open_array(tmp_path / "out.zarr/0", mode="r")
    (multiscale,) = json.loads(group[2])["attributes"]["ome"]["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]] == list("tzyx")
    assert json.loads(array[2])["shape"] == [2, 24, 64, 96]
    values = np.frombuffer(chunk[2], np.uint8).reshape(64, 64, 64)
    np.testing.assert_array_equal(values[:24, :, :32], written[1, :, :, 64:])
    # Nothing of the first timepoint is known.
    assert coarse[0] == 404
    assert [code for code, _, _ in wrong] == [404] * 6 + [403] * 2
    assert {headers["Access-Control-Allow-Origin"] for _, headers, _ in (chunk, coarse)} == {PAGE}


def test_a_failure_is_told_by_the_server(source, settings, monkeypatch):
    def fail(*_):
        raise RuntimeError("the engine is ill")

    monkeypatch.setattr("megaseg_dask.run.looked_at.LookedAt.predict", fail)
    ((code, _, body),) = ask(source, settings, ("{scores}/0/c/0/0/0/0", {}))
    assert (code, body) == (502, b"RuntimeError: the engine is ill")


class Idle:
    """Nothing else is done."""

    def urgent(self):
        return threading.Lock()


def test_the_nearest_is_predicted_first_and_what_nobody_waits_for_is_dropped():
    order = []
    may_begin = threading.Event()

    def waiting(rank):
        def work(_):
            order.append(rank)
            assert may_begin.wait(WAIT_S)
            return b"done"

        return Waiting(lambda: rank, work)

    queue = WaitingList(Idle())
    first = waiting(0)
    queue.add(first)
    others = [waiting(rank) for rank in (5, 3, 4)]
    while not order:
        pass
    for each in others:
        queue.add(each)
    others[1].drop()
    may_begin.set()
    assert others[0].future.result(WAIT_S) == b"done"
    queue.close()
    assert order == [0, 4, 5]


def test_coarse_levels_are_predicted_where_they_are_what_is_seen(source, settings, monkeypatch):
    with viewing(source, None, settings) as viewer:
        assert viewer.chunk(0, 0, 0, 0, level=1) is None
        # It was shown before anything was known: it is asked for again.
        viewer.image.look(Sight((12.0, 32.0, 48.0), level=1))
        assert viewer.image.generation == 1
        assert viewer.chunk(0, 0, 0, 0, level=1).any()
        assert viewer.chunk(0, 0, 0, 1) is not None
        viewer.image.look(Sight((12.0, 32.0, 48.0), level=1))
        assert viewer.image.generation == 1
        monkeypatch.setattr(prediction, "_MAX_PATCHES", 1)
        assert viewer.chunk(1, 0, 0, 0, level=1) is None


def test_scores_in_memory_are_bounded_and_predicted_again(source, settings):
    scores = Scores(max_bytes=24 * 64 * 64)
    with viewing(source, None, settings, scores=scores) as viewer:
        first = viewer.chunk(0, 0, 0, 0)
        viewer.chunk(1, 0, 0, 0)
        assert scores.n_bytes == 24 * 64 * 64
        assert scores.find(viewer.looking.runs[0], Key(0, True, 0, (0, 0, 0))) is None
        np.testing.assert_array_equal(viewer.chunk(0, 0, 0, 0), first)


# Sides of voxels by level, the size of a pixel, and the level that Neuroglancer asks for.
LEVELS = [[2.7, 1, 1], [2.7, 2, 2], [2.7, 4, 4]]


@pytest.mark.parametrize(
    ("pixel", "level"), [(0.2, 0), (1.3, 0), (2.0, 1), (3.5, 1), (3.9, 2), (50, 2)]
)
def test_the_level_that_is_seen(pixel, level):
    assert finest_shown(LEVELS, pixel) == level


def test_options_of_predictions_need_a_model(tmp_path):
    write_image(tmp_path / "cells.zarr", blobs((16, 32, 32)))
    options = ("--threshold 0.3", "--target out.zarr", "--block 16,32,32")
    ends = run([f"view cells.zarr {option}" for option in options], tmp_path)
    for code, line, _ in ends:
        assert code == 2
        assert "only for predictions; add --model NAME" in line


def test_the_scene_has_the_scores_and_the_state_of_what_is_seen(source, settings):
    looking = Looking(str(source), None, settings)
    with looking.open():
        gallery = LiveGallery(str(source), looking)
        try:
            scene = gallery.scene("")
            assert [layer.name for layer in scene.layers] == ["image", "scores"]
            assert scene.layers[1].image.transform() == scene.layers[0].image.transform()
            assert not scene.layers[1].location.exists()
            view = View(t=0, z=3, y=(0, 64), x=(0, 64), pixel=1.0)
            assert count_in_view(scene.layers[1], view, 0.5, 1).n_objects == 0
            waiting = gallery.images["0"].chunk("0/c/0/0/0/0")
            values = np.frombuffer(waiting.future.result(WAIT_S), np.uint8).reshape(64, 64, 64)
            expected = label(values[3] > 127, connectivity=1).max()
            assert count_in_view(scene.layers[1], view, 0.5, 1).n_objects == expected > 0
            command = gallery.command("")
            assert command.startswith(f"megaseg segment {source} TARGET --model ")
            assert command.endswith(" --engine torch --threads 1")
        finally:
            gallery.close()

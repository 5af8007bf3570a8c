"""Scores are predicted where one looks, in a real browser; and nothing leaves this machine."""

import io
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.images import blobs, write_image
from tests.slow.browser.test_view import CONTROLS
from tests.slow.test_looking import viewing

pytest.importorskip("neuroglancer", reason="the viewer is an extra: pip install '.[view]'")
pytestmark = pytest.mark.slow

WAIT_S = 240.0


def orange(browser) -> float:
    """Return the share of the picture that has the color of scores."""
    seen = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
    picture = seen[100:840, CONTROLS:].astype(int)
    return float((picture[..., 0] - picture[..., 2] > 40).mean())


def test_scores_appear_where_one_looks(browser, tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs((24, 96, 128)), chunks=(24, 96, 128))
    options = ("--model", tiny_bundle, "--engine", "torch", "--threads", "1")
    with viewing(source, *options) as viewer:
        browser.open(viewer.url)
        browser.wait_for("document.querySelectorAll('.layer').length === 2", WAIT_S)
        until = time.monotonic() + WAIT_S
        while orange(browser) < 0.02:
            assert time.monotonic() < until, browser.complaints
            time.sleep(0.5)
        assert browser.strangers == set()
        hosts = {urlsplit(url).netloc for url in browser.requests if url.startswith("http")}
        assert hosts == {urlsplit(viewer.url).netloc, urlsplit(viewer.scores).netloc}
        assert [c for c in browser.complaints if "404" not in c] == []

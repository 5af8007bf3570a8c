"""The viewer in a real browser.

What is seen follows the controls, and nothing leaves this machine.
"""

import io
import json
import re
import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip(
    "neuroglancer", reason="the viewer is an extra: pip install 'megaseg-dask[view]'"
)
pytestmark = pytest.mark.slow

# Right of the page's own controls.
CONTROLS = 290


@pytest.fixture
def viewer():
    """Return a function that starts ``megaseg view`` and returns the address it printed."""
    started = []

    def start(target) -> str:
        command = [
            sys.executable,
            "-m",
            "megaseg_dask",
            "view",
            str(target),
            "--no-browser",
            "--json",
        ]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return json.loads(started[-1].stdout.readline())["url"]

    yield start
    for process in started:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        process.stdout.close()


def picture(browser) -> np.ndarray:
    """What is seen right of the controls, when two looks in a row are the same."""
    before, until = None, time.monotonic() + 90
    while time.monotonic() < until:
        seen = np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))[:, CONTROLS:]
        if before is not None and np.array_equal(seen, before) and seen.any():
            return seen
        before = seen
        time.sleep(1.5)
    raise AssertionError("the picture did not come to rest")


def grey(seen: np.ndarray) -> np.ndarray:
    """Where red, green and blue are the same."""
    return (seen.max(axis=2).astype(int) - seen.min(axis=2)) <= 2


def move(browser, control: str, value: float) -> None:
    browser.run(
        f"{{ const e = document.getElementById('{control}'); e.value = {value}; "
        "e.dispatchEvent(new Event('input')); }"
    )


def test_what_is_seen_follows_the_controls(browser, viewer, target):
    url = viewer(target)
    assert urlsplit(url).hostname == "127.0.0.1"
    assert re.fullmatch(r"/[\w-]{32}/", urlsplit(url).path)
    browser.open(url)
    browser.wait_for("document.querySelectorAll('.layer').length === 3")
    assert browser.run(
        "[...document.querySelectorAll('.layer > label')].map(e => e.textContent)"
    ) == ["image", "labels megaseg", "scores"]
    first = picture(browser)
    assert (~grey(first)).mean() > 0.02, "no coloured labels"

    browser.run("document.getElementById('visible-1').click()")
    without_labels = picture(browser)
    assert (~grey(without_labels)).mean() < (~grey(first)).mean() / 2
    assert without_labels.std() > 5, "no image"

    move(browser, "axis-z", 3)
    other_plane = picture(browser)
    assert np.abs(other_plane.astype(int) - without_labels).mean() > 2
    move(browser, "axis-t", 1)
    other_time = picture(browser)
    assert np.abs(other_time.astype(int) - other_plane).mean() > 2

    move(browser, "low-0", 1400)
    assert picture(browser).mean() < other_time.mean()

    browser.run("document.getElementById('visible-2').click()")
    assert (~grey(picture(browser))).mean() > 0.02, "no scores"
    browser.run("document.querySelector('[data-layout=\"4panel\"]').click()")
    picture(browser)

    assert browser.strangers == set()
    # Chunks were read in parts, from the source and from the target.
    data = {urlsplit(u).path.split("/")[3] for u in browser.requests if "/data/" in u}
    assert len(data) == 3
    assert [c for c in browser.complaints if "404" not in c] == []


def test_the_wells_of_a_plate(browser, viewer, tmp_path):
    from megaseg_dask.ngff.plate import Field, Plate, write_plate
    from megaseg_dask.stores import Location
    from tests.fixtures.images import blobs, write_image

    fields = tuple(Field(row, "1", name) for row in "AB" for name in "01")
    write_plate(
        Location.of(tmp_path / "p.zarr"),
        Plate("0.4", "screen", ("A", "B"), ("1", "2"), fields),
        "0.4",
    )
    for number, field in enumerate(fields):
        pixels = np.stack([blobs((16, 40, 44), seed=number), blobs((16, 40, 44), seed=10 + number)])
        write_image(
            tmp_path / "p.zarr" / field.path,
            pixels,
            axes="czyx",
            version="0.4",
            channels=["DNA", "actin"],
        )
    browser.open(viewer(tmp_path / "p.zarr"))
    browser.wait_for("document.querySelectorAll('#wells button').length === 4")
    first = picture(browser)
    assert browser.run("document.querySelector('[aria-label=\"well A/2\"]').disabled")
    browser.run("document.querySelector('[aria-label=\"well B/1\"]').click()")
    browser.wait_for("document.getElementById('field').textContent === 'B/1/0'")
    second = picture(browser)
    assert np.abs(second.astype(int) - first).mean() > 2
    browser.run("document.querySelector('[aria-label=\"field B/1/1\"]').click()")
    browser.wait_for("document.getElementById('field').textContent === 'B/1/1'")
    assert np.abs(picture(browser).astype(int) - second).mean() > 2
    assert browser.strangers == set()

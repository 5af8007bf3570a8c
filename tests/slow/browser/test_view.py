"""The viewer in a real browser.

What is seen follows the controls, and nothing leaves this machine.
"""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import pytest
import zarr
from PIL import Image
from skimage.segmentation import find_boundaries

pytest.importorskip("neuroglancer", reason="the viewer is an extra: pip install '.[view]'")
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
    # Chunks of image, labels, scores and backdrop were read; of outlines that nobody sees, none.
    paths = [urlsplit(url).path for url in browser.requests if "/data/" in url]
    assert len({path.split("/")[3] for path in paths if "/c/" in path}) == 4
    assert [c for c in browser.complaints if "404" not in c] == []


def in_frame(browser, script: str):
    """Run a script with Neuroglancer's ``viewer`` and its window, ``frame``."""
    return browser.run(
        "(() => { const frame = document.getElementById('picture').contentWindow;"
        f" const {{ viewer }} = frame; return {script}; }})()"
    )


def pixels_of_voxels(browser, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the picture where the centers of the voxels of a plane are."""
    found = in_frame(
        browser,
        "{ x: viewer.position.value[0], y: viewer.position.value[1],"
        " scale: viewer.crossSectionScale.value,"
        " width: frame.innerWidth, height: frame.innerHeight }",
    )
    n_y, n_x = shape
    # Sides of voxels are equal in x and y, and the smallest ones.
    rows = found["height"] / 2 + (np.arange(n_y) - found["y"]) / found["scale"]
    columns = found["width"] / 2 + (np.arange(n_x) - found["x"]) / found["scale"]
    return np.rint(rows).astype(int), np.rint(columns).astype(int)


def double_click(browser, x: int, y: int) -> None:
    place = {"x": x, "y": y, "button": "left"}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.wait_for("document.getElementById('pointed-1')?.textContent.includes('object')")
    for count in (1, 2):
        browser.call("Input.dispatchMouseEvent", type="mousePressed", clickCount=count, **place)
        browser.call("Input.dispatchMouseEvent", type="mouseReleased", clickCount=count, **place)


def test_the_mask_by_eye_is_that_of_relabel(browser, viewer, target, tmp_path):
    from megaseg_dask.plan.settings import parse_settings
    from megaseg_dask.run.runner import relabel

    # Labels are made beside those of a copy.
    target = shutil.copytree(target.parent, tmp_path / "copy") / target.name
    browser.open(viewer(target))
    browser.wait_for("document.getElementById('as-mask')")
    # Nothing but the mask.
    for number in (0, 1):
        browser.run(f"document.getElementById('visible-{number}').click()")
    move(browser, "opacity-2", 1)
    seen = []
    for threshold in ("0.42", "0.5"):
        browser.run("document.querySelector('aside').scrollTop = 9999")
        move(browser, "threshold-value", threshold)
        browser.wait_for("document.getElementById('counted').textContent.includes('in view')")
        line = browser.run("document.getElementById('line').textContent")
        name = f"threshold-{float(threshold)}"
        assert line == (
            f"megaseg relabel {target} --threshold {float(threshold)} --label-name {name}"
        )
        options = {"threshold": threshold, "label_name": name, "workers": 0}
        assert relabel(str(target), parse_settings(options)).status == "done"
        labels = zarr.open_array(target / "labels" / name / "0", mode="r")
        for z in (5, 20):
            move(browser, "axis-z", z)
            shown = picture(browser)
            rows, columns = pixels_of_voxels(browser, labels.shape[2:])
            mask = shown[np.ix_(rows, columns)].max(axis=2) > 100
            np.testing.assert_array_equal(mask, labels[0, z] > 0)
            seen.append(mask.mean())
    assert 0 < min(seen) < max(seen) < 1


def test_one_object_stands_out(browser, viewer, target):
    browser.open(viewer(target))
    browser.wait_for("document.querySelectorAll('.layer').length === 3")
    browser.run("document.getElementById('visible-0').click()")
    labels = zarr.open_array(target / "labels/megaseg/0", mode="r")[0]
    z = labels.shape[0] // 2
    filled = picture(browser)
    rows, columns = pixels_of_voxels(browser, labels.shape[1:])

    def strength(seen: np.ndarray) -> np.ndarray:
        return seen[np.ix_(rows, columns)].max(axis=2)

    np.testing.assert_array_equal(strength(filled) > 20, labels[z] > 0)
    ids, counts = np.unique(labels[z][labels[z] > 0], return_counts=True)
    label = ids[np.argmax(counts)]
    inside = np.argwhere(labels[z] == label)
    y, x = inside[len(inside) // 2]
    double_click(browser, CONTROLS + int(columns[x]), int(rows[y]))
    browser.wait_for(
        f"document.getElementById('selected').textContent.startsWith('object {label}: ')"
    )
    n_voxels = (labels == label).sum()
    text = browser.run("document.getElementById('selected').textContent")
    assert text.startswith(f"object {label}: {n_voxels} voxels, ")
    assert "µm³" in text
    one = strength(picture(browser))
    assert one[labels[z] == label].min() > 60
    assert one[(labels[z] > 0) & (labels[z] != label)].max() < 60

    # In three dimensions there is its mesh, in its color, and no other.
    browser.run("document.querySelector('[data-layout=\"4panel\"]').click()")
    seen = picture(browser)
    height, width, _ = seen.shape
    corner = seen[height // 2 + 60 : -60, 20 : width // 2 - 20]
    assert (~grey(corner)).mean() > 0.01
    assert any(url.endswith(f"/{label}") for url in browser.requests)
    browser.run("document.querySelector('[data-layout=\"xy\"]').click()")
    browser.run("document.getElementById('clear').click()")

    # Contours are on the objects, at their borders.
    browser.run("document.getElementById('contours-1').click()")
    lines = strength(picture(browser)) > 20
    borders = find_boundaries(np.pad(labels[z], 1), mode="inner")[1:-1, 1:-1]
    np.testing.assert_array_equal(lines, borders)

    # Small objects are hidden, and the command says how.
    browser.run("document.getElementById('filled-1').click()")
    move(browser, "min-size", 80)
    browser.wait_for("!document.getElementById('command').hidden")
    line = browser.run("document.getElementById('line').textContent")
    min_size = int(re.search(r"--min-size (\d+)", line)[1])
    sizes = np.bincount(labels.ravel())
    kept = strength(picture(browser)) > 20
    np.testing.assert_array_equal(kept, (labels[z] > 0) & (sizes[labels[z]] >= min_size))
    assert browser.strangers == set()
    assert browser.complaints == []


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

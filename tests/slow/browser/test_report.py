"""The report in a real browser: opened from disk, quiet, and asking for nothing."""

import pytest

from megaseg_dask.tools.report.write import write_report

pytestmark = pytest.mark.slow


def test_the_report_opens_from_disk(browser, target):
    place = write_report(str(target))
    browser.open(place.path.as_uri())
    assert browser.run("document.querySelector('h1').textContent") == "out.zarr"
    # Every picture was decoded, every chart has an extent.
    assert browser.run("[...document.images].length") >= 9
    assert browser.run("[...document.images].every(picture => picture.naturalWidth > 0)")
    assert browser.run(
        "[...document.querySelectorAll('svg')].every(c => c.getBoundingClientRect().width > 100)"
    )
    # Nothing is wider than a laptop's window.
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.run("document.querySelector('#volumes a').click()")
    assert browser.run("document.querySelector(':target').className") == "volume"
    assert browser.requests == [place.path.as_uri()] + [
        url for url in browser.requests if url.startswith("data:")
    ]
    assert browser.complaints == []

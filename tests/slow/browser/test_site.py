"""The built pages in a real browser.

Nothing is asked of another host, and nothing is complained of.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.servers import range_server

pytestmark = pytest.mark.slow


def test_pages_ask_nobody_else(browser, tmp_path):
    pytest.importorskip("mkdocs", reason="the pages are built by mkdocs: pip install '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, check=True, timeout=250)
    with range_server(tmp_path / "site") as url:
        for page in ("index.html", "exactness/index.html", "api/index.html"):
            browser.open(f"{url}/{page}")
            browser.wait_for("document.querySelector('h1')")
            assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.strangers == set()
    assert browser.complaints == []

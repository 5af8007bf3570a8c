"""Every command and code block of README and docs is run, as it stands there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent


def blocks() -> list[tuple[str, str, str]]:
    """Page, language and text of each fenced block; text after the language is a note to the reader."""
    found = []
    for page in PAGES:
        for i, (language, text) in enumerate(re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)):
            found.append((f"{page.name}-{i}", language, text))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the demo has run, so that examples find its images."""
    folder = tmp_path_factory.mktemp("examples")
    subprocess.run([BIN / "megaseg", "demo", "--quiet"], cwd=folder, check=True, timeout=280)
    return folder


@pytest.mark.parametrize(("name", "language", "text"), blocks(), ids=lambda v: v if "-" in str(v)[:40] else "")
def test_block_does_what_it_says(name, language, text, folder):
    if language in ("", "text"):
        pytest.skip("output, not input")
    if language == "python":
        (folder / "megaseg-demo/example.py").write_text(text)
        run([sys.executable, "example.py"], folder / "megaseg-demo")
        return
    assert language == "sh"
    folder = folder / "megaseg-demo"
    for line in text.replace("\\\n", " ").splitlines():
        command = line.split("#")[0].strip()
        if command.startswith("make "):
            target = command.split()[1]
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"no make target {target}"
        elif command.startswith(("git clone", "pip install", "source ", "cd megaseg-demo")):
            continue  # each command runs in the demo's folder already, with the environment on its PATH
        elif command.startswith("megaseg view "):
            # It shows until it is interrupted.
            run(["bash", "-c", f"timeout --preserve-status --signal=INT 15 {command} --no-browser"], folder)
        elif command:
            run(["bash", "-c", command], folder)


def run(command, folder) -> None:
    import os

    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_examples_need_bash():
    assert shutil.which("bash")

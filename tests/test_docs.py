"""The pages, and the manifest of Fractal: what is generated is current, what is quoted is said.

Also all of it builds, offline.

``python -m tests.test_docs`` writes the generated pages anew.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fractal_task_tools._create_manifest import create_manifest
from typer.main import get_command

import megaseg_dask
from megaseg_dask.cli.app import build_app
from megaseg_dask.plan.settings import Settings, declared, options_table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


# -- generated pages


def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Each command with all words that call it, those of a group in place of the group."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(words), command
    for name, child in (children or {}).items():
        yield from walk(child, (*words, name))


def commands_page() -> str:
    """All that ``--help`` says, as a page; the options of ``segment`` have a page of their own."""
    top = get_command(build_app())
    parts = [
        "# Commands",
        paragraphs(top.help or ""),
        f"```text\n{usage(top, 'megaseg')}\n```",
        options_of(top),
    ]
    for name, command in walk(top, ("megaseg",)):
        parts += [
            f"## `{name}`",
            paragraphs(command.help or ""),
            f"```text\n{usage(command, name)}\n```",
        ]
        parts.append(options_of(command))
    return "\n\n".join(filter(None, parts)) + "\n"


def usage(command: Any, name: str) -> str:
    import click

    words = command.collect_usage_pieces(click.Context(command))
    return " ".join([name, *words])


def paragraphs(text: str) -> str:
    """Text as Markdown; what stands after \\b keeps its lines."""
    found = []
    for part in re.sub(r"\n +", "\n", text).split("\n\n"):
        if part.startswith("\b"):
            title, *lines = part.lstrip("\b\n").splitlines()
            found.append("\n".join([f"{title}\n", "```text", *lines, "```"]))
        else:
            found.append(" ".join(part.split()))
    return "\n\n".join(filter(None, found))


def is_setting(parameter: Any) -> bool:
    """Whether a parameter means what the setting of its name does."""
    name = parameter.name
    return name in Settings.model_fields and parameter.help.startswith(declared(name).help)


def options_of(command: Any) -> str:
    own = [p for p in command.params if p.name != "help"]
    shared = [p for p in own if p.name in Settings.model_fields and "--channel" not in p.opts]
    linked = len(shared) > 5
    rows = [row(p) for p in own if not (linked and is_setting(p))]
    table = ["| option | meaning |", "|---|---|", *rows] if rows else []
    if not linked:
        return "\n".join(table)
    more = "And all of the [options](options.md)."
    if "model" not in [p.name for p in shared]:
        names = ", ".join(f"`{p.opts[0]}`" for p in shared)
        more = f"And of the [options](options.md): {names}."
    return "\n".join([*table, "", more])


def row(parameter: Any) -> str:
    takes = parameter.metavar or ""
    is_option = parameter.opts[0].startswith("-")
    names = ", ".join(sorted(parameter.opts, key=len, reverse=True)) if is_option else ""
    default = parameter.default if isinstance(parameter.default, str | int | float) else None
    shown = f" (default: {default})" if default not in (None, False, "") else ""
    text = f"{names} {takes}".strip().replace("|", "\\|")
    return f"| `{text}` | {(parameter.help or '').replace('|', chr(92) + '|')}{shown} |"


def fractal_manifest() -> str:
    """The tasks of Fractal with the schemas of their arguments, as `fractal-manifest create`."""
    made = create_manifest(
        raw_package_name="megaseg_dask", task_list_path="tools.fractal.task_list"
    )
    return json.dumps(made, indent=2) + "\n"


PAGES = {
    "../megaseg_dask/__FRACTAL_MANIFEST__.json": fractal_manifest,
    "options.md": lambda: f"# Options of `segment` and `plan`\n\n{options_table()}\n",
    "commands.md": commands_page,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name):
    assert (DOCS / name).read_text() == PAGES[name](), "run: python -m tests.test_docs"


def test_measured_tables_are_those_of_the_kept_results():
    from benchmarks import tables

    pages = [page.read_text() for page in tables.PAGES]
    whole = "".join(pages)
    assert all(f"<!-- table {name} -->" in whole for name in tables.TABLES)
    for page in pages:
        assert page == tables.filled(page), "run: python -m benchmarks.tables"


# -- quoted messages


def texts() -> str:
    """All text of the package, a line each, with … for what is put in."""
    found = []
    for path in Path(megaseg_dask.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def messages() -> list[str]:
    return re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.M)


@pytest.fixture(scope="module")
def said() -> str:
    return texts()


@pytest.mark.parametrize("message", messages())
def test_a_quoted_message_is_still_said(message, said):
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…") if part.strip())
    assert re.search(f"^.*{pattern}", said, re.M), f"nothing in the package says {message}"


def test_messages_are_found_by_machine():
    assert len(messages()) > 25


# -- what is said of installing


def test_nobody_is_told_to_install_from_an_index():
    """The package is on none yet: a hint names a checkout, a wheel, or the packages themselves."""
    from_an_index = re.compile(r"pip install\b[^`\n]*\bmegaseg[-_]dask\b(?!\S*\.whl)")
    folders = ("docs", "deploy", "megaseg_dask", "tests", "benchmarks", "starter")
    pages = [page for folder in folders for page in (ROOT / folder).rglob("*")]
    kinds = {".md", ".py", ".yaml", ".sh", ".def", ".html"}
    for page in [ROOT / "README.md", *(page for page in pages if page.suffix in kinds)]:
        told = from_an_index.search(page.read_text())
        assert told is None, (page, told)


# -- the site


def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path):
    pytest.importorskip("mkdocs", reason="the pages are built by mkdocs: pip install '.[docs]'")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert built.returncode == 0, built.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        asked = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\" >]+)", text)
        asked += re.findall(
            r"<link[^>]*rel=\"?(?:stylesheet|preconnect|icon)[^>]*href=\"?(https?:[^\" >]+)", text
        )
        assert not asked, page
    api = (tmp_path / "site/api/index.html").read_text()
    assert "megaseg_dask.predict" in api
    assert "SettingsError" in api


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())

"""A folder of a disk: objects are whole, durable if asked for, and never absent unread."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megaseg_dask.errors import StoreError
from megaseg_dask.stores import Location
from megaseg_dask.stores.local import sync

# As it is before tests/conftest.py replaces it.
FSYNC = os.fsync

LOOKS: dict[str, Callable[[Location], object]] = {
    "get": lambda folder: folder.get("a.json"),
    "get_range": lambda folder: folder.get_range("a.json", 0, 4),
    "size": lambda folder: folder.size("a.json"),
    "keys": lambda folder: folder.keys(""),
    "children": lambda folder: folder.children(),
    "exists": lambda folder: folder.exists(),
    "is_folder": lambda folder: folder.is_folder(),
    "remove": lambda folder: folder.remove(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_folder_that_cannot_be_asked_for_is_not_absent(look, tmp_path):
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(StoreError, match="Too many levels of symbolic links"):
        look(Location.of(tmp_path / "run/megaseg"))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_what_is_absent_is_an_answer(look, tmp_path):
    (tmp_path / "file").write_text("of another kind")
    for name in ("absent", "file/below"):
        assert not look(Location.of(tmp_path / name))


@pytest.mark.parametrize("write", [Location.put, Location.create])
def test_a_durable_object_is_flushed_with_its_name_and_its_new_folders(
    write, tmp_path, monkeypatch
):
    flushed = []

    def record(descriptor: int) -> None:
        path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        flushed.append((path, (tmp_path / "run/journal/1").exists()))

    monkeypatch.setattr(os, "fsync", record)
    write(Location.of(tmp_path / "run"), "journal/1", b"{}", durable=True)
    (staged, was_there), *entries = flushed
    assert staged.startswith(f"{tmp_path}/run/journal/1.")
    assert not was_there
    folders = [tmp_path / "run/journal", tmp_path / "run", tmp_path]
    assert entries == [(str(folder), True) for folder in folders]
    assert Location.of(tmp_path / "run/journal").children() == ["1"]


def test_a_file_system_is_flushed_also_before_its_folder_is_there(tmp_path, monkeypatch):
    """By the functions of the system: other tests flush nothing, see tests/conftest.py."""
    sync(tmp_path)
    sync(tmp_path / "absent/folder")
    monkeypatch.setattr(os, "fsync", FSYNC)
    assert Location.of(tmp_path).create("a.json", b"{}", durable=True)
    monkeypatch.setattr(ctypes, "CDLL", FailingLibrary)
    ctypes.set_errno(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


class FailingLibrary:
    """A system library whose file system cannot keep what was written."""

    def __init__(self, *_: object, **__: object) -> None:
        self.syncfs = lambda _: -1


@pytest.mark.parametrize("write", [Location.put, Location.create])
def test_a_failed_write_leaves_nothing(write, tmp_path):
    folder = Location.of(tmp_path / "run")
    (tmp_path / "run/taken/below").mkdir(parents=True)
    if write is Location.put:
        with pytest.raises(StoreError):
            write(folder, "taken", b"{}")
    else:
        assert not write(folder, "taken", b"{}")
    assert folder.children() == ["taken"]


def test_files_that_a_killed_writer_left_are_no_objects(tmp_path):
    (tmp_path / f"a.json.megaseg-{'0' * 32}.partial").write_text("{")
    (tmp_path / "a.json").write_text("{}")
    folder = Location.of(tmp_path)
    assert folder.keys("") == ["a.json"]
    assert folder.sweep_partial() == 1

"""Promise 5, call by call: a kill before any change of the disk, then the same command again."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from megaseg_dask.events import Result
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import journal
from megaseg_dask.run.runner import relabel
from megaseg_dask.stores.arrays import clear_array_cache
from megaseg_dask.tools.importing.convert import import_files
from megaseg_dask.tools.importing.planning import ImportOptions
from tests.fixtures.disk import Disk, Killed, PowerLog, Tree, read_tree, write_tree
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.run.test_where import add_labels

SEED = 16
# Kills in each scenario; `MEGASEG_KILLS=1000` tries every one.
N_KILLS = int(os.environ.get("MEGASEG_KILLS", "8"))
SHAPE = (20, 36, 40)
# What a run keeps for the next one, and what differs from one run to the next.
_RECORDS = re.compile(r"\w+\.zarr\.run/.*(plan\.json|lease.*|(journal|log|volumes)/.*)")
# Losses in each scenario.
N_LOSSES = int(os.environ.get("MEGASEG_LOSSES", "2"))
# Power cuts in each scenario.
N_CUTS = int(os.environ.get("MEGASEG_POWER_CUTS", "14"))


@dataclass(frozen=True)
class Place:
    """Where a command works, and with which bundle."""

    folder: Path
    target: str
    bundle: Path


def segment_image(place: Place, options: dict[str, Any]) -> Result:
    given = {"model": str(place.bundle), "engine": "torch", "threads": 1, "overlap": 0, **options}
    source = str(place.folder / "image.zarr")
    return segment_here(source, str(place.folder / place.target), parse_settings(given))


def label_again(place: Place, options: dict[str, Any]) -> Result:
    return relabel(str(place.folder / place.target), parse_settings({"workers": 0, **options}))


def import_planes(place: Place, options: dict[str, Any]) -> Result:
    files = [str(path) for path in sorted(place.folder.glob("*.tif"))]
    parts = ImportOptions(pattern="{row}{column}_z{z}.tif", voxel_size=(1.0, 1.0, 1.0))
    settings = parse_settings({"workers": 0})
    return import_files(files, str(place.folder / place.target), parts, settings).result


Command = Callable[[Place, dict[str, Any]], Result]


@dataclass
class Scenario:
    """A command on a folder: what stands there before, and its options.

    ``earlier`` are commands that ended there before, with their options.
    """

    before: Callable[[Path], None]
    options: dict[str, Any] = field(default_factory=dict)
    target: str = "out.zarr"
    earlier: Sequence[tuple[Command, dict[str, Any]]] = ()
    command: Command = segment_image


def _image(folder: Path, version: str = "0.5", seed: int = 0) -> None:
    write_image(folder / "image.zarr", blobs(SHAPE, seed), version=version, chunks=(20, 20, 20))


def _plate(folder: Path) -> None:
    import zarr

    root = zarr.open_group(folder / "image.zarr", mode="w", zarr_format=3)
    wells = [{"path": f"A/{n}", "rowIndex": 0, "columnIndex": n - 1} for n in (1, 2)]
    columns = [{"name": "1"}, {"name": "2"}]
    plate = {"name": "p", "rows": [{"name": "A"}], "columns": columns, "wells": wells}
    root.attrs["ome"] = {"version": "0.5", "plate": plate}
    root.create_group("A")
    for number, well in enumerate(wells):
        group = root.create_group(well["path"])
        group.attrs["ome"] = {"version": "0.5", "well": {"images": [{"path": "0"}]}}
        write_image(folder / "image.zarr" / well["path"] / "0", blobs((16, 20, 24), number))


def _masked(folder: Path) -> None:
    _image(folder)
    mask = np.zeros(SHAPE, "uint16")
    mask[4:12, 5:30, :15] = 1
    mask[4:12, 5:30, 16:30] = 2
    add_labels(folder / "image.zarr", mask)


def _planes(folder: Path) -> None:
    for number, well in enumerate(("A1", "B2")):
        for z, plane in enumerate(blobs((4, 90, 70), number)):
            tifffile.imwrite(folder / f"{well}_z{z}.tif", plane, photometric="minisblack")


BLOCKS = {"block": "20,20,40", "threshold": "otsu", "fill_holes": 20}
ALL = {"outputs": "labels,scores,mask,measurements"}
SPLIT = {**BLOCKS, "split": "distance", "split_depth": 0.2}
AGAIN = {"label_name": "again", "threshold": "otsu", "outputs": "labels,mask,measurements"}
# Runs that ended before: of other options, or what is labeled again.
OTHER = (segment_image, {"threshold": 0.3, **ALL})
KEPT = (segment_image, {"block": "20,20,40", "keep_logits": True})
OTHER_AGAIN = (label_again, {**AGAIN, "threshold": 0.3})
SCENARIOS = {
    "plain": Scenario(_image, ALL),
    "blocks": Scenario(_image, {**BLOCKS, **ALL}),
    "plate": Scenario(_plate, ALL),
    "in place": Scenario(
        lambda folder: _image(folder, "0.4"),
        {"block": "20,20,40", "outputs": "labels,measurements"},
        "image.zarr",
    ),
    "overwrite": Scenario(_image, {"overwrite": True, "ome_zarr": "0.4", **ALL}, earlier=[OTHER]),
    "overwrite blocks": Scenario(_image, {"overwrite": True, **BLOCKS, **ALL}, earlier=[OTHER]),
    "split": Scenario(_image, {**SPLIT, **ALL}),
    "statistics of a plate": Scenario(
        _plate, {"normalization": "plate", "block": "16,20,16", **ALL}
    ),
    "where": Scenario(_masked, {"where": "cells", "regions": "cells", **BLOCKS, **ALL}),
    "where in one block": Scenario(_masked, {"where": "cells", "regions": "cells", **ALL}),
    "other voxels": Scenario(_image, {"voxel_size": "1.2,0.8,1", **BLOCKS, **ALL}),
    "relabel": Scenario(
        _image, {**AGAIN, "split": "distance"}, earlier=[KEPT], command=label_again
    ),
    "relabel a plate": Scenario(
        _plate, AGAIN, earlier=[(segment_image, {"keep_logits": True})], command=label_again
    ),
    "relabel and overwrite": Scenario(
        _image, {**AGAIN, "overwrite": True}, earlier=[KEPT, OTHER_AGAIN], command=label_again
    ),
    "import": Scenario(_planes, command=import_planes),
}


class Runs:
    """One scenario in one folder, that is run, cut and set back."""

    def __init__(self, scenario: Scenario, folder: Path, bundle: Path) -> None:
        self._scenario = scenario
        self.folder = folder / "disk"
        self.folder.mkdir()
        self._place = Place(self.folder, scenario.target, bundle)
        self.disk = Disk(self.folder)
        scenario.before(self.folder)
        for command, options in scenario.earlier:
            assert command(self._place, options).status == "done"
        self.before = read_tree(self.folder)
        self._times = {name: (self.folder / name).stat().st_mtime_ns for name in self.before}
        with self.disk.watched():
            assert self.run().status == "done"
        self.n_changes = self.disk.n_changes
        self.calm = read_tree(self.folder)

    def run(self, **options: Any) -> Any:
        clear_array_cache()
        return self._scenario.command(self._place, {**self._scenario.options, **options})

    def record(self) -> PowerLog:
        """Return all that one undisturbed run does to the disk."""
        self.reset(self.before)
        log = PowerLog(self.folder)
        with log.recorded():
            assert self.run().status == "done"
        return log

    def reset(self, tree: Tree) -> None:
        shutil.rmtree(self.folder)
        write_tree(self.folder, tree)
        # What nobody wrote since has its old time.
        for name, written_ns in self._times.items():
            if tree.get(name) == self.before[name]:
                os.utime(self.folder / name, ns=(written_ns, written_ns))

    def require_calm(self, where: str) -> None:
        assert self.run().status == "done", where
        found = read_tree(self.folder)
        assert _names(found) == _names(self.calm), where
        for name in _names(found):
            assert _content(name, found) == _content(name, self.calm), f"{where}: {name}"
        assert self.run(overwrite=False).already_done, where


def _names(tree: Tree) -> set[str]:
    return {name for name in tree if not _RECORDS.fullmatch(name)}


def _is_metadata(name: str) -> bool:
    return name.endswith((".json", ".zattrs", ".zgroup", ".zarray"))


def _content(name: str, tree: Tree) -> Any:
    if _is_metadata(name):
        return json.loads(tree[name])
    return tree[name]


@pytest.fixture(autouse=True)
def _many_records(monkeypatch):
    """Each finished task is recorded at once, so that a kill may fall between any two."""
    monkeypatch.setattr(journal, "_MIN_SEGMENT_S", 0.0)


def cases() -> Iterator[Any]:
    """The name of a scenario, and how many kills it takes: a few in the fast tests."""
    yield "plain", 3
    for name in SCENARIOS:
        yield pytest.param(name, N_KILLS, marks=[pytest.mark.slow, pytest.mark.timeout(900)])


@pytest.mark.parametrize(("name", "n_kills"), list(cases()), ids=str)
def test_a_kill_before_any_change_of_the_disk(name, n_kills, tmp_path, tiny_bundle, cheap_engine):
    runs = Runs(SCENARIOS[name], tmp_path, tiny_bundle)
    step = max(runs.n_changes // n_kills, 1)
    first = random.Random(SEED).randrange(step)
    for kill_at in range(first, first + step * n_kills, step):
        runs.reset(runs.before)
        # Threads do not make the same number of changes each time: the last kill may come too late.
        with runs.disk.watched(kill_at), suppress(Killed):
            runs.run()
        runs.require_calm(f"{name}, killed before change {kill_at} of {runs.n_changes}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_power_is_cut_at_any_moment(name, tmp_path, tiny_bundle, cheap_engine):
    """What was not flushed is lost or torn, by chance."""
    runs = Runs(SCENARIOS[name], tmp_path, tiny_bundle)
    log = runs.record()
    for trial in range(N_CUTS):
        runs.reset(log.cut(runs.before, random.Random(SEED + trial)))
        runs.require_calm(f"{name}, power cut, seed {SEED + trial}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCENARIOS)
def test_what_a_killed_run_wrote_is_lost_or_torn(name, tmp_path, tiny_bundle, cheap_engine):
    """Any object that is no record: of outputs, of intermediate data, or of metadata."""
    runs = Runs(SCENARIOS[name], tmp_path, tiny_bundle)
    chance = random.Random(SEED)
    n_lost = 0
    while n_lost < N_LOSSES:
        runs.reset(runs.before)
        kill_at = chance.randrange(runs.n_changes // 2, runs.n_changes)
        with runs.disk.watched(kill_at), suppress(Killed):
            runs.run()
        where = f"{name}, killed before change {kill_at}"
        # A run that replaces results removes them first: it may be killed before it writes.
        if written := _written(runs.before, read_tree(runs.folder)):
            lost = chance.choice(written)
            _lose(runs.folder / lost, is_torn=chance.random() < 0.5)
            n_lost += 1
            where += f", {lost} lost"
        runs.require_calm(where)


def _written(before: Tree, after: Tree) -> list[str]:
    """Return what is new, or data of other content, without records.

    Metadata that an earlier run shares is left out: its loss is for that run to repair.
    """
    new = _names(after) - before.keys()
    kept = _names(after) & before.keys()
    replaced = {name for name in kept if after[name] != before[name] and not _is_metadata(name)}
    return sorted(new | replaced)


def _lose(path: Path, *, is_torn: bool) -> None:
    content = path.read_bytes()
    path.unlink()
    if is_torn:
        path.write_bytes(content[: len(content) // 2])

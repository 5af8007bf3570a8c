"""Run two source trees on the same inputs, and compare every file that they leave at their targets.

    python benchmarks/same_outputs.py BEFORE AFTER [--case NAME]

BEFORE and AFTER are checkouts of the repository. Run folders (`*.run`) hold logs, times and
hosts, and are left out. The exit code is 1 if a file differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet
import zarr
from scipy.ndimage import gaussian_filter

UNITS = {"z": "micrometer", "y": "micrometer", "x": "micrometer", "t": "second"}
TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


@dataclass(frozen=True)
class Case:
    """A command of both trees: the source's name, and the options of ``megaseg segment``."""

    source: str
    options: tuple[str, ...]
    is_in_place: bool = False


ALL_OUTPUTS = ("--outputs", "labels,scores,mask,measurements")
IN_BLOCKS = ("--block", "16,64,64", "--patch", "16,32,32")
CASES = {
    "staged": Case(
        "image.zarr",
        (*IN_BLOCKS, *ALL_OUTPUTS, "--threshold", "otsu", "--fill-holes", "50", "--min-size", "5"),
    ),
    "staged-roi": Case("image.zarr", (*IN_BLOCKS, "--roi", "3:30,5:90,10:100", *ALL_OUTPUTS)),
    "staged-level": Case(
        "image.zarr", (*IN_BLOCKS, "--normalization", "level:1", "--threshold", "li")
    ),
    "one-block": Case("image.zarr", (*ALL_OUTPUTS, "--patch", "16,32,32", "--fill-holes", "9")),
    "floats": Case("floats.zarr", ("--nan-to-background", *IN_BLOCKS, "--scores-dtype", "float32")),
    "in-place": Case("image.zarr", ("--outputs", "labels,mask", *IN_BLOCKS), is_in_place=True),
    "plate-0.5": Case("plate.zarr", ("--channel", "0,1", "--patch", "16,32,32", *ALL_OUTPUTS)),
    "plate-0.4": Case(
        "plate.zarr",
        ("--channel", "DAPI", *IN_BLOCKS, "--ome-zarr", "0.4", "--threshold", "yen", *ALL_OUTPUTS),
    ),
    "old": Case("old.zarr", (*IN_BLOCKS, "--connectivity", "3", *ALL_OUTPUTS)),
}


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return a smooth random image, uint16."""
    noise = np.random.default_rng(seed).standard_normal(shape)
    smooth = gaussian_filter(noise, 3)
    return (1000 + 400 * smooth / smooth.std()).clip(0).astype("uint16")


def write_levels(group: zarr.Group, data: np.ndarray, axes: str, *, is_v3: bool) -> dict:
    """Write two levels of an image and return its entry of ``multiscales``."""
    halves = tuple(slice(None, None, 2 if axis in "yx" else 1) for axis in axes)
    datasets = []
    for name, level, factor in (("0", data, 1.0), ("1", data[halves], 2.0)):
        chunks = tuple(min(n, 32) for n in level.shape)
        options = {"dimension_names": list(axes)} if is_v3 else {}
        if not is_v3:
            options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        array = group.create_array(
            name, shape=level.shape, dtype=level.dtype, chunks=chunks, **options
        )
        array[...] = level
        sizes = {"z": 0.29, "y": 0.11 * factor, "x": 0.11 * factor}
        scale = [sizes.get(axis, 1.0) for axis in axes]
        steps = [{"type": "scale", "scale": scale}]
        datasets.append({"path": name, "coordinateTransformations": steps})
    listed = []
    for axis in axes:
        entry = {"name": axis, "type": TYPES[axis]}
        if axis in UNITS:
            entry["unit"] = UNITS[axis]
        listed.append(entry)
    return {"name": "image", "axes": listed, "datasets": datasets}


def write_image(path: Path, data: np.ndarray, axes: str, *, is_v3: bool = True) -> None:
    """Write an OME-Zarr image with zarr alone."""
    group = zarr.open_group(path, mode="w", zarr_format=3 if is_v3 else 2)
    entry = write_levels(group, data, axes, is_v3=is_v3)
    ome: dict = {"multiscales": [entry]}
    if "c" in axes:
        ome["omero"] = {"channels": [{"label": "DAPI"}, {"label": "GFP"}]}
    if is_v3:
        group.attrs["ome"] = {"version": "0.5", **ome}
    else:
        entry["version"] = "0.4"
        group.attrs.update(ome)


def write_plate(path: Path) -> None:
    """Write a plate of two wells, with two timepoints and two channels."""
    root = zarr.open_group(path, mode="w", zarr_format=3)
    wells = [
        {"path": "A/1", "rowIndex": 0, "columnIndex": 0},
        {"path": "B/2", "rowIndex": 1, "columnIndex": 1},
    ]
    root.attrs["ome"] = {
        "version": "0.5",
        "plate": {
            "name": "plate",
            "rows": [{"name": "A"}, {"name": "B"}],
            "columns": [{"name": "1"}, {"name": "2"}],
            "wells": wells,
            "version": "0.5",
        },
    }
    for number, well in enumerate(wells):
        group = root.create_group(well["path"])
        images = {"images": [{"path": "0"}], "version": "0.5"}
        group.attrs["ome"] = {"version": "0.5", "well": images}
        volumes = [blobs((24, 70, 66), 10 * number + i) for i in range(4)]
        data = np.stack(volumes).reshape(2, 2, 24, 70, 66)
        write_image(path / well["path"] / "0", data, "tczyx")


def write_sources(folder: Path) -> None:
    """Write every source that a case names."""
    write_image(folder / "image.zarr", blobs((36, 110, 120), 1), "zyx")
    write_image(folder / "old.zarr", blobs((36, 110, 120), 2), "zyx", is_v3=False)
    floats = blobs((30, 80, 90), 3).astype("float32")
    floats[4:9, 20:40, 30:60] = np.nan
    write_image(folder / "floats.zarr", floats, "zyx")
    write_plate(folder / "plate.zarr")


def megaseg(tree: Path, folder: Path, *arguments: str) -> None:
    """Run the command line of a tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "MEGASEG_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "megaseg_dask", *arguments]
    subprocess.run(command, check=True, env=environment, cwd=folder, stderr=subprocess.DEVNULL)


def run_case(tree: Path, folder: Path, case: Case) -> None:
    """Segment the case's source with a tree; all outputs are below ``folder``."""
    write_sources(folder)
    target = case.source if case.is_in_place else "out.zarr"
    common = ("--model", "starter", "--workers", "1", "--threads", "1", "--quiet")
    megaseg(tree, folder, "segment", case.source, target, *common, *case.options)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that is no log, no time and no kept conversion."""
    result = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or name.parts[0] == "home":
            continue
        if any(part.endswith(".run") for part in name.parts):
            continue
        result[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result


def compare(before: Path, after: Path, name: str) -> int:
    """Run one case with both trees and return the number of files that differ."""
    with tempfile.TemporaryDirectory() as old, tempfile.TemporaryDirectory() as new:
        for tree, folder in ((before, old), (after, new)):
            if name == "demo":
                megaseg(tree, Path(folder), "demo", "demo", "--quiet")
            else:
                run_case(tree, Path(folder), CASES[name])
        expected = digests(Path(old))
        actual = digests(Path(new))
        different = [k for k in {**expected, **actual} if expected.get(k) != actual.get(k)]
        print(f"{name}: {len(expected)} files, {len(different)} differ", flush=True)
        for key in different:
            print(f"  {key}: {describe(Path(old) / key, Path(new) / key)}", flush=True)
    return len(different)


def describe(before: Path, after: Path) -> str:
    """Return in which values two JSON documents or tables differ."""
    if not before.exists():
        return "new"
    if not after.exists():
        return "absent"
    if before.suffix == ".json":
        values = [leaves(json.loads(path.read_text())) for path in (before, after)]
    elif before.suffix == ".parquet":
        tables = [pyarrow.parquet.read_table(path).to_pydict() for path in (before, after)]
        values = [{name: str(column) for name, column in table.items()} for table in tables]
    else:
        return f"{before.stat().st_size} and {after.stat().st_size} bytes"
    old, new = values
    return ", ".join(key for key in {**old, **new} if old.get(key) != new.get(key))


def leaves(value: object, name: str = "") -> dict[str, str]:
    """Return the values inside nested JSON objects and lists, by their paths."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        return {name: str(value)}
    result = {name: type(value).__name__}
    for key, part in parts:
        result |= leaves(part, f"{name}/{key}")
    return result


def main() -> None:
    """Compare all cases, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--case", choices=["demo", *CASES])
    arguments = parser.parse_args()
    names = [arguments.case] if arguments.case else ["demo", *CASES]
    n_different = 0
    for name in names:
        n_different += compare(arguments.before.resolve(), arguments.after.resolve(), name)
    sys.exit(n_different > 0)


if __name__ == "__main__":
    main()

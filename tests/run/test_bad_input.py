"""What goes wrong while a run works.

It ends with its exit code and a line, and the same command goes on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import zarr

from megaseg_dask.cli.app import main
from megaseg_dask.errors import SourceError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image

SHAPE = (40, 70, 90)
# Eight blocks, and a light grid of patches.
OPTIONS = ["--threads", "1", "--block", "20,40,50", "--overlap", "0"]


@pytest.fixture
def megaseg(tiny_bundle, capsys):
    """The command in this process; returns exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)
    shared = [
        "--model",
        str(tiny_bundle),
        "--workers",
        "0",
        "--retries",
        "0",
    ]

    def call(source: Path, target: Path, *options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["segment", str(source), str(target), *shared, *OPTIONS, *options])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_image(tmp_path_factory.mktemp("source") / "cells.zarr", blobs(SHAPE))


@pytest.fixture(scope="session")
def undisturbed(source, tiny_bundle, tmp_path_factory) -> dict[str, object]:
    """What a run gives that nothing goes wrong in."""
    target = tmp_path_factory.mktemp("undisturbed") / "out.zarr"
    arguments = [
        "--model",
        str(tiny_bundle),
        "--workers",
        "0",
        "--quiet",
        *OPTIONS,
    ]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["segment", str(source), str(target), *arguments])
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 0
    return contents(target)


def contents(target: Path) -> dict[str, object]:
    """Every array and all metadata of an image, by path."""
    group = zarr.open_group(target, mode="r")
    members = dict(group.members(max_depth=None))
    arrays = {
        f"{path} voxels": array[...].tolist()
        for path, array in members.items()
        if isinstance(array, zarr.Array)
    }
    return arrays | {path: dict(node.attrs) for path, node in {"": group, **members}.items()}


def files(*folders: Path) -> dict[Path, tuple[int, int]]:
    found = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def run_folder(target: Path) -> Path:
    return target.with_name(target.name + ".run") / "megaseg"


def is_no_image(target: Path) -> bool:
    """Tell that nobody can take what is there for an image."""
    with pytest.raises(SourceError, match="the target of a run that is not finished"):
        read_image(Location.of(target))
    return "multiscales" not in json.dumps(dict(zarr.open_group(target, mode="r").attrs))


# -- chunks that cannot be read


@pytest.mark.parametrize(
    ("damage", "block"),
    [
        pytest.param(b"garbage", "20,40,50", id="garbage"),
        pytest.param(b"garbage", "40,70,90", id="garbage, one task"),
        pytest.param(b"", "20,40,50", id="empty", marks=pytest.mark.slow),
        pytest.param(None, "20,40,50", id="cut", marks=pytest.mark.slow),
    ],
)
def test_a_corrupt_chunk_is_named_and_mended(damage, block, megaseg, source, undisturbed, tmp_path):
    image, target = shutil.copytree(source, tmp_path / "cells.zarr"), tmp_path / "out.zarr"
    chunk = image / "0/c/1/2/2"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-20] if damage is None else damage)
    code, out, err = megaseg(image, target, "--block", block)
    assert (code, out) == (1, "")
    assert str(chunk) in err
    assert "run the same command again" in err
    assert is_no_image(target)
    chunk.write_bytes(whole)
    assert megaseg(image, target, "--block", block)[0] == 0
    found = contents(target)
    voxels = [key for key in undisturbed if key.endswith(" voxels")]
    assert {key: found[key] for key in voxels} == {key: undisturbed[key] for key in voxels}


def test_warnings_are_told_also_if_something_failed(megaseg, source, tmp_path):
    image = shutil.copytree(source, tmp_path / "cells.zarr")
    (image / "0/c/0/0/0").unlink()
    (image / "0/c/1/2/2").write_bytes(b"garbage")
    code, _, err = megaseg(image, tmp_path / "out.zarr", "--normalization", "1000,400")
    assert code == 1
    assert "FAILED" in err
    assert "warning: 1 chunk of the source is missing" in err


def test_a_failure_as_json(megaseg, source, tmp_path):
    image = shutil.copytree(source, tmp_path / "cells.zarr")
    (image / "0/c/0/0/0").write_bytes(b"garbage")
    code, out, _ = megaseg(image, tmp_path / "out.zarr", "--json")
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1]["event"] == "result"
    assert [event["event"] for event in events if event["event"] != "progress"][-2:] == [
        "failure",
        "result",
    ]
    assert (code, events[-1]["exit_code"], events[-1]["status"]) == (1, 1, "failed")
    assert "0/c/0/0/0 is corrupt" in events[-1]["failures"][0]["error"]


# -- voxels that are no numbers


@pytest.mark.parametrize(
    ("value", "block"), [(np.nan, "20,40,50"), (np.inf, "40,70,90")], ids=["nan", "inf"]
)
def test_nan_is_named_or_background(value, block, megaseg, tmp_path):
    voxels = blobs(SHAPE, dtype="float32")
    voxels[7, 60, 80] = voxels[20:22, 30:40, 30:40] = value
    image, target = write_image(tmp_path / "cells.zarr", voxels), tmp_path / "out.zarr"
    code, _, err = megaseg(image, target, "--block", block)
    assert code == 1
    assert "(z, y, x) = (7, 60, 80)" in err
    assert is_no_image(target)

    options = [
        "--block",
        block,
        "--nan-to-background",
        "--scores-dtype",
        "float32",
        "--outputs",
        "labels,scores,mask",
    ]
    code, _, err = megaseg(image, target, *options)
    assert code == 2
    assert "nan_to_background: was False, now True" in err

    assert megaseg(image, target, *options, "--overwrite")[0] == 0
    out = zarr.open_group(target, mode="r")
    scores, bad = out["0"][...], ~np.isfinite(voxels)
    assert not scores[bad].any()
    assert not out["labels/megaseg/0"][...][bad].any()
    assert not out["labels/megaseg_mask/0"][...][bad].any()
    assert np.isfinite(scores).all()
    assert (scores[~bad] > 0).all()


@pytest.mark.parametrize("block", ["20,40,50", "40,70,90"])
def test_an_absent_chunk_is_the_fill_value_and_told(block, megaseg, tmp_path):
    image = blobs(SHAPE)
    source = write_image(tmp_path / "cells.zarr", image, chunks=(20, 35, 45))
    (source / "0/c/1/0/1").unlink()
    code, out, err = megaseg(source, tmp_path / "out.zarr", "--block", block, "--json")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["warnings"] == [
        "1 chunk of the source is missing, and was read as its fill value (t=0 c=0: 1)"
    ]
    image[20:, :35, 45:] = 0
    written = write_image(tmp_path / "filled.zarr", image)
    assert megaseg(written, tmp_path / "expected.zarr", "--block", block)[0] == 0
    found, expected = contents(tmp_path / "out.zarr"), contents(tmp_path / "expected.zarr")
    assert all(found[name] == expected[name] for name in expected if name.endswith("voxels"))


def test_a_corrupt_chunk_leaves_the_other_blocks_where_the_normalisation_is_given(
    megaseg, tmp_path
):
    checked = zarr.codecs.ZstdCodec(checksum=True)
    source = write_image(
        tmp_path / "cells.zarr", blobs((20, 120, 160)), chunks=(20, 40, 40), compressors=checked
    )
    options = ["--normalization", "1000,400", "--block", "20,40,40"]
    assert megaseg(source, tmp_path / "expected.zarr", *options)[0] == 0
    chunk = source / "0/c/0/2/3"
    good = chunk.read_bytes()
    # A flipped bit, which the checksum of the codec tells from data.
    chunk.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    target = tmp_path / "out.zarr"
    code, _, err = megaseg(source, target, *options)
    assert code == 1
    assert "0/c/0/2/3 is corrupt" in err
    missing = zarr.open_group(target, mode="r").attrs["megaseg"]["missing_boxes"]
    assert 0 < len(missing) < 12
    assert zarr.open_group(target, mode="r")["0"][:, :40, :40].any()
    chunk.write_bytes(good)
    assert megaseg(source, target, *options)[0] == 0
    assert contents(target) == contents(tmp_path / "expected.zarr")


# -- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# Room for: not all arrays' metadata; the arrays and no block; some blocks.
@pytest.mark.parametrize(
    "room_kb",
    [pytest.param(24, marks=pytest.mark.slow), 120, pytest.param(300, marks=pytest.mark.slow)],
)
def test_a_full_disk_is_resumable(room_kb, megaseg, source, undisturbed, small_disk):
    target, filler = small_disk / "out.zarr", small_disk / "filler"
    filler.write_bytes(bytes(4 * 2**20 - room_kb * 2**10))
    code, _, err = megaseg(source, target)
    assert code == 1, err
    assert "No space left" in err
    filler.unlink()
    assert not (target / "zarr.json").exists() or is_no_image(target)
    code, _, err = megaseg(source, target)
    assert code == 0, err
    assert contents(target) == undisturbed


# -- somebody ends it


def alive(session: int) -> list[str]:
    """Command lines of the processes of a session that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def hear_interrupts() -> None:
    """Tests that a shell runs in the background inherit that SIGINT is ignored.

    A user's terminal does not.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_goes_on(how, source, megaseg, tiny_bundle, tmp_path):
    # So many patches that the run is still at them when it is interrupted.
    slowly = ["--overlap", "0.75"]
    megaseg(source, tmp_path / "undisturbed.zarr", *slowly)
    undisturbed = contents(tmp_path / "undisturbed.zarr")
    target = tmp_path / "out.zarr"
    options = ["--model", tiny_bundle, *OPTIONS, *slowly]
    command = [sys.executable, "-m", "megaseg_dask", "segment", source, target, *options]
    errors = tmp_path / "stderr.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [*map(str, command), "--json"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        ) as process,
    ):
        assert process.stdout is not None
        events = (json.loads(line) for line in process.stdout)
        progress = (event for event in events if event["event"] == "progress")
        next(event for event in progress if event["stage"] == "segment" and event["n_done"])
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        *_, last = events
        assert process.wait(120) == 130
    assert (last["event"], last["status"], last["exit_code"]) == ("result", "interrupted", 130)
    assert errors.read_text().splitlines() == [
        "megaseg: stopping; press Ctrl-C again to quit now",
        "megaseg: interrupted; run the same command again to resume",
    ]
    started = time.monotonic()
    while (left := alive(process.pid)) and time.monotonic() - started < 120:
        time.sleep(0.2)
    assert left == []
    assert is_no_image(target)
    n_recorded = sum(
        p.read_text().count('"stage"') for p in (run_folder(target) / "journal").iterdir()
    )
    assert n_recorded >= 2

    again = subprocess.run(
        [*map(str, command), "--json"], capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 0, again.stderr
    events = map(json.loads, again.stdout.splitlines())
    assert next(event for event in events if event["event"] == "started")["n_done"] == n_recorded
    assert contents(target) == undisturbed


@pytest.mark.slow
def test_a_second_interrupt_ends_it_at_once(source, tiny_bundle, tmp_path):
    options = ["--model", tiny_bundle, *OPTIONS, "--overlap", "0.75"]
    command = [
        sys.executable,
        "-m",
        "megaseg_dask",
        "segment",
        source,
        tmp_path / "out.zarr",
        *options,
    ]
    with subprocess.Popen(
        [*map(str, command), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        events = (json.loads(line) for line in process.stdout)
        next(event for event in events if event.get("stage") == "segment")
        process.send_signal(signal.SIGINT)
        while "stopping" not in process.stderr.readline():
            assert process.poll() is None
        # Sooner, it would be the same interrupt, which `timeout` and terminals send twice.
        time.sleep(0.25)
        process.send_signal(signal.SIGTERM)
        # The first one may have ended all but the interpreter, which then has no handlers any more.
        assert process.wait(120) in (130, -signal.SIGTERM)
    started = time.monotonic()
    while (left := alive(process.pid)) and time.monotonic() - started < 120:
        time.sleep(0.2)
    assert left == []


# -- a target that is there


def test_a_finished_run_is_already_done(megaseg, source, tmp_path):
    target = tmp_path / "out.zarr"
    assert megaseg(source, target)[0] == 0
    before = files(target, run_folder(target))
    code, out, err = megaseg(source, target)
    assert code == 0
    # Nothing but doubts about the result, and what to type next.
    lines = [line for line in err.splitlines() if "doubt: " not in line]
    assert all("megaseg re" in line or "megaseg view" in line for line in lines), err
    assert "already done" in out
    code, out, _ = megaseg(source, target, "--json")
    assert code == 0
    assert json.loads(out)["already_done"] is True
    assert files(target, run_folder(target)) == before


def test_a_target_that_was_removed_is_made_again(megaseg, source, undisturbed, tmp_path):
    target = tmp_path / "out.zarr"
    assert megaseg(source, target)[0] == 0
    shutil.rmtree(target)
    assert megaseg(source, target)[0] == 0
    assert contents(target) == undisturbed


def test_other_options_are_listed_and_refused(megaseg, source, tmp_path):
    target = tmp_path / "out.zarr"
    assert megaseg(source, target)[0] == 0
    before = files(target, run_folder(target))
    code, _, err = megaseg(
        source, target, "--threshold", "0.7", "--connectivity", "2", "--workers", "2"
    )
    assert code == 2
    assert "threshold: was 0.5, now 0.7" in err
    assert "connectivity: was 1, now 2" in err
    assert "workers" not in err
    assert files(target, run_folder(target)) == before


def test_overwrite_starts_anew_and_keeps_foreign_files(megaseg, source, undisturbed, tmp_path):
    target = tmp_path / "out.zarr"
    assert megaseg(source, target, "--threshold", "0.7", "--scores-dtype", "float32")[0] == 0
    assert megaseg(source, target, "--label-name", "other", "--overwrite")[0] == 0
    (target / "notes.txt").write_text("mine")
    kept = files(target / "labels/other")
    code, _, err = megaseg(source, target, "--overwrite")
    assert code == 0, err
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()  # zarr would warn of it
    assert files(target / "labels/other") == kept
    found = contents(target)
    assert {k: v for k, v in found.items() if "other" not in k and k != "labels"} == {
        k: v for k, v in undisturbed.items() if k != "labels"
    }
    assert set(found["labels"]["ome"]["labels"]) == {"megaseg", "other"}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_labels_in_the_source_leave_its_image_alone(version, megaseg, undisturbed, tmp_path):
    image = write_image(tmp_path / "cells.zarr", blobs(SHAPE), version=version)
    before = files(image)
    options = ["--outputs", "labels", "--ome-zarr", version]
    assert megaseg(image, image, *options)[0] == 0
    after = files(image)
    assert {p: after[p] for p in before} == before
    labels = zarr.open_group(image, mode="r")["labels/megaseg/0"][...]
    assert labels.tolist() == undisturbed["labels/megaseg/0 voxels"]
    # And anew, over our own.
    assert megaseg(image, image, *options, "--min-size", "50", "--overwrite")[0] == 0

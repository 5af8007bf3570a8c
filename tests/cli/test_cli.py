"""The command line.

Help that answers at once, and one clear line for every wrong request, with nothing written.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from megaseg_dask.cli.app import build_app, main
from tests.fixtures.bundles import write_checkpoint
from tests.fixtures.images import blobs, write_image

MEGASEG = [sys.executable, "-m", "megaseg_dask"]
HEAVY = {"torch", "dask", "distributed", "zarr", "monai", "numpy", "rich.progress"}


def megaseg(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [*MEGASEG, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process; returns exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    monkeypatch.setenv("COLUMNS", "200")
    yield call
    signal.signal(signal.SIGTERM, before)


# -- help


@pytest.mark.parametrize(
    "arguments", [["--help"], ["segment", "--help"], ["plan", "-h"], ["--version"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, contextlib; from megaseg_dask.cli.app import main\n"
        f"with contextlib.suppress(SystemExit): main({arguments})\n"
        f"sys.exit(','.join({HEAVY} & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    assert ended.stdout


def test_help_teaches(run):
    code, text, _ = run("segment", "--help")
    assert code == 0
    assert "megaseg segment cells.zarr" in text
    for heading in ("What to segment", "The network", "What to write", "Where and how it runs"):
        assert heading in text
    for default in (
        "(default: labels,scores)",
        "(default: 0.5)",
        "(default: 0)",
        "(default: MegaSeg_v1)",
    ):
        assert default in text
    assert "megaseg plan cells.zarr" in run("--help")[1]
    assert "megaseg plan cells.zarr" in run("plan", "--help")[1]


def test_plan_takes_the_options_of_segment(run):
    words = [set(run(command, "--help")[1].split()) for command in ("segment", "plan")]
    options = [{word for word in found if word.startswith("--")} for found in words]
    assert options[0] - options[1] == {"--quiet"}


def commands() -> list[str]:
    from typer.main import get_command

    def walk(command, words):
        for name, child in sorted(getattr(command, "commands", {}).items()):
            yield from (
                walk(child, [*words, name])
                if hasattr(child, "commands")
                else [" ".join([*words, name])]
            )

    return list(walk(get_command(build_app()), []))


@pytest.mark.parametrize("command", commands())
def test_each_command_has_examples(run, command):
    code, text, _ = run(*command.split(), "--help")
    assert code == 0
    examples = text.partition("Example")[2]
    assert f"megaseg {command}" in examples


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megaseg seg", "segment"),
        ("megaseg segment a b --prec", "--precision"),
        ("megaseg segment a b --engine op", "openvino"),
        ("megaseg models f", "fetch"),
    ],
)
def test_a_shell_completes(line, expected):
    words = line.split()
    environment = {
        **os.environ,
        "_MEGASEG_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    ended = subprocess.run(MEGASEG, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == [expected]


def test_the_script_of_a_shell_can_be_shown(monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    shown = megaseg("--show-completion", "bash")
    assert "_MEGASEG_COMPLETE=complete_bash" in shown.stdout


def test_version(run):
    code, text, _ = run("--version")
    assert code == 0
    assert text.split()[0] == "megaseg-dask"


def test_nothing_asked_shows_the_help(run):
    code, text, _ = run()
    assert code == 2
    assert "Commands" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "No such command 'frob'; see megaseg --help"),
        (["segment", "a", "b", "--zzyzx"], "No such option: --zzyzx; see megaseg segment --help"),
        (["segment", "a"], "Missing argument 'TARGET'; see megaseg segment --help"),
        (["plan", "a", "b", "c"], "unexpected extra argument"),
        (["plan", "a", "b", "--patch"], "requires an argument"),
    ],
)
def test_unknown_words_are_refused_in_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in one_line(err)
    code, out, _ = run(*arguments, "--json")
    assert code == 2
    # An option without its value swallows --json; everywhere else the last line is a result.
    assert arguments[-1] == "--patch" or refusal(out)["exit_code"] == 2


def test_a_real_process_says_the_same():
    ended = megaseg("segment", "a", "b", "--zzyzx")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "No such option: --zzyzx" in one_line(ended.stderr)


# -- wrong requests


def one_line(text: str) -> str:
    assert text.startswith("megaseg: ")
    assert len(text.splitlines()) == 1, text
    return text


def refusal(out: str) -> dict[str, object]:
    lines = out.splitlines()
    assert len(lines) == 1, out
    record: dict[str, object] = json.loads(lines[0])
    assert (record["event"], record["status"]) == ("result", "error")
    return record


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, byte for byte."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def image(folder: Path, name: str = "source.zarr", shape=(20, 32, 40), **options) -> Path:
    return write_image(folder / name, np.zeros(shape, "uint16"), **options)


def plain_folder(folder: Path) -> Path:
    (folder / "things").mkdir()
    (folder / "things" / "notes.txt").write_text("mine")
    return folder / "things"


def plain_array(folder: Path, name: str = "array.zarr") -> Path:
    zarr.create_array(folder / name, shape=(20, 20, 20), dtype="uint8")
    return folder / name


def text_file(folder: Path, name: str) -> Path:
    (folder / name).write_text("hello")
    return folder / name


def truncated(folder: Path) -> Path:
    whole = write_checkpoint(folder / "whole.ckpt")
    whole.write_bytes(whole.read_bytes()[:-5000])
    return whole


def another_network(folder: Path) -> Path:
    torch.save({"state_dict": {"backbone.encoder.weight": torch.zeros(3, 3)}}, folder / "vit.ckpt")
    return folder / "vit.ckpt"


def channels(folder: Path) -> Path:
    return image(folder, shape=(3, 20, 32, 40), axes="czyx", channels=["DNA", "GFP"])


def times(folder: Path) -> Path:
    return image(folder, shape=(3, 20, 32, 40), axes="tzyx")


def labelled(folder: Path) -> Path:
    """An image with somebody else's label image under our default name."""
    image(folder)
    write_image(folder / "source.zarr/labels/megaseg", np.ones((20, 32, 40), "uint8"))
    return folder / "source.zarr"


def folder_of_numbers(folder: Path) -> Path:
    (folder / "photos" / "0").mkdir(parents=True)
    text_file(folder / "photos" / "0", "cat.jpg")
    return folder / "photos"


WRONG: dict[str, tuple[Callable[[Path, Path], list[object]], str]] = {
    "no source": (lambda d, out: [d / "missing.zarr", out], "missing.zarr does not exist"),
    "a slip": (
        lambda d, out: [image(d).with_name("sorce.zarr"), out],
        "does not exist (source.zarr is there)",
    ),
    "a file": (lambda d, out: [text_file(d, "cells.tif"), out], "cells.tif is a tif file"),
    "a folder": (
        lambda d, out: [plain_folder(d), out],
        "things is a folder with notes.txt, not an OME-Zarr image",
    ),
    "an array": (lambda d, out: [plain_array(d), out], "array.zarr is a single Zarr array"),
    "no channel": (
        lambda d, out: [channels(d), out],
        "3 channels; choose one with --channel: 0 (DNA), 1 (GFP), 2",
    ),
    "channel by name": (
        lambda d, out: [channels(d), out, "--channel", "RFP"],
        "has no such channel",
    ),
    "channel by index": (
        lambda d, out: [channels(d), out, "--channel", "3"],
        "it has 0 (DNA), 1 (GFP), 2",
    ),
    "channel of another digit": (
        lambda d, out: [channels(d), out, "--channel", "²"],
        "has no such channel",
    ),
    "level": (
        lambda d, out: [image(d), out, "--level", "3"],
        "--level 3: the source has levels 0 to 0",
    ),
    "time": (
        lambda d, out: [times(d), out, "--time", "2:5"],
        "--time 2:5: the source has timepoints 0:3",
    ),
    "too small": (lambda d, out: [image(d, shape=(15, 32, 40)), out], "at least (16, 16, 16)"),
    "2D": (
        lambda d, out: [image(d, shape=(32, 40), axes="yx"), out],
        "no z; the model needs 3D volumes",
    ),
    "complex": (
        lambda d, out: [write_image(d / "c.zarr", np.zeros((20, 20, 20), "c8")), out],
        "integers or floats",
    ),
    "patch": (
        lambda d, out: [image(d), out, "--patch", "20,32,32"],
        "the nearest that works is 16,32,32",
    ),
    "bottleneck": (
        lambda d, out: [image(d), out, "--patch", "16"],
        "two voxels or more at the bottleneck",
    ),
    "nonsense": (
        lambda d, out: [image(d), out, "--overlap", "1"],
        "--overlap 1: expected a number below 1",
    ),
    "memory": (lambda d, out: [image(d), out, "--memory", "100MB"], "raise --memory"),
    "block and memory": (
        lambda d, out: [image(d), out, "--memory", "100MB", "--block", "20,32,40"],
        "the smallest possible block needs",
    ),
    "target is a file": (lambda d, out: [image(d), text_file(d, "out.zarr")], "is a file"),
    "target is a folder": (
        lambda d, out: [image(d), plain_folder(d)],
        "exists, but no run of megaseg is recorded there",
    ),
    "target is an image": (
        lambda d, out: [image(d), image(d, "other.zarr")],
        "megaseg did not write",
    ),
    "overwrite an image": (
        lambda d, out: [image(d), image(d, "other.zarr"), "--overwrite"],
        "megaseg did not write",
    ),
    "overwrite an array": (
        lambda d, out: [image(d), plain_array(d), "--overwrite"],
        "megaseg did not write",
    ),
    "overwrite numbers": (
        lambda d, out: [image(d), folder_of_numbers(d), "--overwrite"],
        "megaseg did not write",
    ),
    "overwrite labels": (
        lambda d, out: [labelled(d), d / "source.zarr", "--outputs", "labels", "--overwrite"],
        "megaseg did not write",
    ),
    "target in source": (
        lambda d, out: [image(d), d / "source.zarr/out.zarr"],
        "lies inside the source",
    ),
    "source in target": (lambda d, out: [image(d), d], "contains the source"),
    "source in run folder": (
        lambda d, out: [
            image(d, "out.zarr.run/megaseg/source.zarr"),
            d / "out.zarr",
            "--overwrite",
        ],
        "contains the source",
    ),
    "run folder": (
        lambda d, out: [image(d), d / "out.zarr.run", "--overwrite"],
        "reserved for run folders",
    ),
    "target is source": (lambda d, out: [image(d), d / "source.zarr"], "pass --outputs labels"),
    "below a file": (
        lambda d, out: [image(d), text_file(d, "file") / "out.zarr"],
        "cannot be written",
    ),
    "no place": (lambda d, out: [image(d), "/proc/out.zarr"], "/proc/out.zarr cannot be written"),
    "an url": (lambda d, out: ["gopher://host/cells.zarr", out], "gopher://host/cells.zarr"),
    "no model": (lambda d, out: [image(d), out, "--model", "nope"], "neither a known model"),
    "published model": (
        lambda d, out: [image(d), out, "--model", "MegaSeg_light"],
        "megaseg models import",
    ),
    "no checkpoint": (
        lambda d, out: [image(d), out, "--model", text_file(d, "a.ckpt")],
        "a.ckpt is not a checkpoint",
    ),
    "truncated": (lambda d, out: [image(d), out, "--model", truncated(d)], "or not a whole one"),
    "another network": (
        lambda d, out: [image(d), out, "--model", another_network(d)],
        "not of a DynUNet",
    ),
    "a folder as model": (
        lambda d, out: [image(d), out, "--model", plain_folder(d)],
        "checkpoints/*.ckpt",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_gets_one_line_and_writes_nothing(case, run, tiny_bundle, tmp_path):
    request, message = WRONG[case]
    arguments = request(tmp_path, tmp_path / "out.zarr")
    if "--model" not in arguments:
        arguments += ["--model", tiny_bundle]
    before = tree(tmp_path)
    code, out, err = run("segment", *arguments, "--threads", "1", "--json")
    assert tree(tmp_path) == before
    assert code == 2
    assert message in one_line(err)
    record = refusal(out)
    assert record["exit_code"] == 2
    assert f"megaseg: {record['error']}\n" == err


@pytest.mark.parametrize("command", ["segment", "plan"])
def test_a_wrong_request_in_a_real_process(command, tmp_path):
    before = tree(tmp_path)
    ended = megaseg(command, tmp_path / "missing.zarr", tmp_path / "out.zarr", "--model", "starter")
    assert tree(tmp_path) == before
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "missing.zarr does not exist" in one_line(ended.stderr)


def test_a_scheduler_that_does_not_answer_writes_nothing(run, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("megaseg_dask.run.cluster.connection.START_S", 1)
    image(tmp_path)
    before = tree(tmp_path)
    address = ["--scheduler", "tcp://127.0.0.1:1"]
    code, _, err = run(
        "segment", tmp_path / "source.zarr", tmp_path / "out.zarr", "--model", tiny_bundle, *address
    )
    assert code == 2
    assert "tcp://127.0.0.1:1: no answer" in one_line(err)
    assert tree(tmp_path) == before


# -- plan


def test_plan_prints_one_object_and_writes_nothing(tiny_bundle, tmp_path):
    source = write_image(tmp_path / "cells.zarr", blobs((40, 70, 90)))
    before = tree(tmp_path)
    options = ["--model", tiny_bundle, "--threads", "1", "--block", "20,40,50"]
    # A patch that is quickly measured.
    options += ["--patch", "16,32,32"]
    ended = megaseg("plan", source, tmp_path / "out.zarr", *options, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert tree(tmp_path) == before
    (line,) = ended.stdout.splitlines()
    plan = json.loads(line)
    assert plan["event"] == "plan"
    assert (plan["blocks"], plan["block_shape"], plan["tasks_done"]) == (8, [20, 40, 50], 0)
    assert plan["options"]["threads"] == 1


def test_plan_for_a_person(run, tiny_bundle, tmp_path):
    source = image(tmp_path)
    code, out, err = run("plan", source, tmp_path / "out.zarr", "--model", tiny_bundle)
    assert (code, err) == (0, "")
    rows = {line.split()[0] for line in out.splitlines()}
    assert {"source", "model", "patches", "blocks", "memory", "tasks"} <= rows


# -- how a command ends


@pytest.fixture
def broken(monkeypatch):
    """A planning step that raises what it is told to."""

    def set_error(error: BaseException) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr("megaseg_dask.run.runner.Request", fail)

    return set_error


def test_interrupt_says_how_to_go_on(run, broken):
    broken(KeyboardInterrupt())
    code, out, err = run("segment", "a", "b", "--json")
    assert code == 130
    assert json.loads(out) == {
        "event": "result",
        "status": "interrupted",
        "error": "interrupted; run the same command again to resume",
        "exit_code": 130,
    }
    assert "run the same command again" in one_line(err)


def test_a_bug_ends_with_a_result_and_its_traceback(capsys, broken):
    broken(ZeroDivisionError("division by zero"))
    with pytest.raises(ZeroDivisionError):
        main(["segment", "a", "b", "--json"])
    out = capsys.readouterr().out
    assert refusal(out) == {
        "event": "result",
        "status": "error",
        "error": "ZeroDivisionError: division by zero",
        "exit_code": 1,
    }


def test_messages_stay_on_one_line(run, broken):
    broken(OSError())  # not ours: leaves as it is
    from megaseg_dask.errors import SourceError

    broken(SourceError("cells\n.zarr does not exist"))
    code, out, err = run("segment", "a", "b", "--json")
    assert code == 2
    assert one_line(err) == "megaseg: cells .zarr does not exist\n"
    assert refusal(out)["error"] == "cells\n.zarr does not exist"


SLOW_TO_LEAVE = """
import time
from megaseg_dask.cli import app

def run(*_, **__):
    try:
        print("running", flush=True)
        time.sleep(600)
    finally:
        time.sleep(600)

app._SAME_INTERRUPT_S = {same_interrupt_s}
app.build_app = lambda _: run
app.main([])
"""


# An echo comes within this time, however long a busy machine takes to send it.
@pytest.mark.parametrize(("same_interrupt_s", "ends"), [(600.0, False), (0.0, True)])
def test_a_second_interrupt_ends_what_is_slow_to_leave_and_an_echo_of_the_first_does_not(
    same_interrupt_s, ends
):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TO_LEAVE.format(same_interrupt_s=same_interrupt_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(120 if ends else 2) == 130
        except subprocess.TimeoutExpired:
            assert not ends
        else:
            assert ends
        finally:
            process.kill()

"""`megaseg train` through cyto-dl: bundles, cards, interruption, early stopping."""

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from megaseg_dask.models import load_bundle, read_bundle
from tests.fixtures.images import write_image
from tests.slow.cytodl.conftest import NETWORK, PATCH, events_of, megaseg, training

# The first test of a session may have to install cyto-dl.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def epochs_of(out: Path) -> list[dict]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_training_ends_with_a_bundle_and_its_card(trained, start):
    told = json.loads(trained.with_name("told.json").read_text())
    result = told[-1]
    assert (result["event"], result["status"], result["stopped"]) == (
        "result",
        "done",
        "max_epochs",
    )
    assert [event["epoch"] for event in told if event["event"] == "epoch"] == list(range(6))
    assert any(event["event"] == "progress" for event in told)
    bundle, before = load_bundle(trained), load_bundle(start)
    assert (bundle.network, bundle.patch_shape, bundle.overlap) == (NETWORK, PATCH, (0.25,) * 3)
    assert bundle.digest == result["digest"]
    assert all(
        not bundle.weights[key].equal(before.weights[key])
        for key in before.weights
        if "conv" in key
    )
    rows = epochs_of(trained)
    assert [int(row["epoch"]) for row in rows] == list(range(6))
    best = min(rows, key=lambda row: float(row["validation_loss"]))
    assert f"epoch_{result['best_epoch']:03d}" in bundle.origins["weights"]
    assert (int(best["epoch"]), float(best["validation_loss"])) == (
        result["best_epoch"],
        result["best_loss"],
    )
    assert float(rows[-1]["training_loss"]) < float(rows[0]["training_loss"])
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([0.003 * 0.9**epoch for epoch in range(1, 7)])
    card = (trained / "MODEL_CARD.md").read_text()
    assert bundle.digest in card
    assert "curves.png" in card
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (trained / "training/cache").exists()


def test_matrix_units_compute_in_bfloat16_and_weights_stay_in_float32(trained):
    processor = Path("/proc/cpuinfo")
    has_matrix_units = processor.exists() and "amx_bf16" in processor.read_text()
    bundle = load_bundle(trained)
    assert bundle.precision == ("bf16" if has_matrix_units else "fp32")
    assert {values.dtype for values in bundle.weights.values()} == {torch.float32}


def test_the_same_command_again_has_nothing_to_do(trained, manifest, start):
    (event,) = events_of(megaseg(*training(manifest, start, trained, "--max-epochs", "6")))
    assert event["already_done"]
    assert event["digest"] == load_bundle(trained).digest


def test_another_training_does_not_touch_it(trained, manifest, start):
    process = megaseg(*training(manifest, start, trained, "--patches-per-image", "2"))
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "--overwrite" in json.loads(out)["error"]


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_wrong_request(manifest, start, tmp_path):
    process = megaseg(*training(manifest, start, tmp_path / "out", "--accelerator", "gpu"))
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert json.loads(out.splitlines()[-1])["error"].startswith(
        "--accelerator gpu: the environment of cyto-dl finds none"
    )
    assert not (tmp_path / "out").exists()


def test_killed_and_interrupted_it_goes_on_and_ends_by_itself(manifest, start, tmp_path):
    out = tmp_path / "out"
    command = training(manifest, start, out, "--max-epochs", "60", "--patience", "3")
    killed = megaseg(*command)
    read_until_epoch(killed, 1)
    killed.kill()
    killed.communicate(timeout=200)
    require_nothing_goes_on(out)
    begun = int(epochs_of(out / "training")[-1]["epoch"])
    # A shell lets what it puts into the background ignore Ctrl-C.
    process = megaseg(
        *command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    again = read_until_epoch(process)
    assert again["epoch"] in (begun, begun + 1)  # the row is written just before the checkpoint
    assert again["epoch"] > 1, "what was told was saved"
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert json.loads(rest.splitlines()[-1])["status"] == "interrupted"
    assert not (out / "checkpoints").exists()
    begun = int(epochs_of(out / "training")[-1]["epoch"])
    told = events_of(megaseg(*command))
    epochs = [event for event in told if event["event"] == "epoch"]
    first = epochs[0]["epoch"]
    assert first in (begun, begun + 1)
    assert first > again["epoch"], "what was told was saved"
    assert (told[-1]["stopped"], told[-1]["status"]) == ("patience", "done")
    rows = epochs_of(out)
    assert [int(row["epoch"]) for row in rows] == list(range(len(rows)))
    assert len(rows) < 60
    best = min(range(len(rows)), key=lambda i: float(rows[i]["validation_loss"]))
    assert best == len(rows) - 1 - 3 == told[-1]["best_epoch"] == epochs[-1]["best_epoch"]
    before = [float(row["validation_loss"]) for row in rows[: first + 1]]
    assert epochs[0]["best_epoch"] == before.index(min(before))


def read_until_epoch(process: subprocess.Popen, epoch: int | None = None) -> dict:
    """Read what a command tells until it has done an epoch."""
    for line in process.stdout:
        told = json.loads(line)
        if told["event"] == "epoch" and epoch in (None, told["epoch"]):
            return told
    raise AssertionError(f"the training ended before: {process.stderr.read()}")


def require_nothing_goes_on(out: Path) -> None:
    """No process outlives the command; it ends once its stdin is closed."""
    until = time.monotonic() + 120
    while found := [
        p for p in Path("/proc").glob("[0-9]*/cmdline") if str(out).encode() in _bytes(p)
    ]:
        assert time.monotonic() < until, found
        time.sleep(0.2)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_it_learns_from_an_omezarr_whose_channel_and_labels_are_named(start, tmp_path):
    from starter.simulation import simulate

    made = simulate(5, (24, 48, 80), "nuclei", difficulty=0.2)
    image = made.image[None].repeat(2, 0)
    image[0] = 7
    source = write_image(
        tmp_path / "image.zarr", image, axes="czyx", version="0.4", channels=["empty", "DNA"]
    )
    for name in ("nuclei", "other"):
        write_image(source / "labels" / name, made.mask.astype("uint16"), version="0.4")
    import zarr

    zarr.open_group(source / "labels", mode="a", zarr_format=2).attrs["labels"] = [
        "nuclei",
        "other",
    ]
    out = tmp_path / "out"
    command = training(source, start, out, "--channel", "DNA", "--label", "nuclei")
    result = events_of(megaseg(*command, "--max-epochs", "500", "--max-time", "00:00:01"))[-1]
    # One step at least is made, and its epoch ended with a validation: however slow, there is a
    # bundle.
    assert (result["status"], result["stopped"]) == ("done", "max_time")
    assert load_bundle(out).digest == result["digest"]
    n_epochs = result["n_epochs"] + 1
    result = events_of(megaseg(*command, "--max-epochs", n_epochs))[-1]
    assert (result["status"], result["stopped"], result["n_epochs"]) == (
        "done",
        "max_epochs",
        n_epochs,
    )
    bundle = read_bundle(out)
    assert bundle.network == NETWORK
    assert {path.name for path in out.iterdir()} == {
        "MODEL_CARD.md",
        "checkpoints",
        "curves.png",
        "metrics.csv",
        "train_config.yaml",
        "training",
    }

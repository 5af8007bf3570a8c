"""Write trained weights as a half-precision bundle in cyto-dl's layout.

    python -m starter.export RUN_FOLDER|BUNDLE megaseg_dask/models/starter [--calibrate]

Of a folder of `train.py` the moving average, of a bundle of `megaseg train` its
best epoch. `--calibrate` gives the logits the scale and shift of `calibrate.py`.
"""

# ruff: noqa: T201 - a command of its own: its result is what it prints

import argparse
from pathlib import Path

import torch

from megaseg_dask.models import NetworkSpec, NewBundle, load_bundle, save_bundle
from megaseg_dask.models.cards import MEGASEG_VOXEL_SIZE_UM
from megaseg_dask.models.facts import record_of, write_record
from starter.calibrate import N_IMAGES, calibrate_bundle, fold
from starter.train import FILTERS, STAGES

# Simulated images have voxels of many sizes around this one (`simulation.py`).
VOXEL_SIZE_UM = MEGASEG_VOXEL_SIZE_UM


def export(run: Path, bundle: Path, epoch: int, n_calibration: int = 0) -> Path:
    """Return the path of the checkpoint that was written.

    ``n_calibration`` is how many images of each kind calibrate it; with 0 it stays as it is.
    """
    if (run / "last.pt").exists():
        average = torch.load(run / "last.pt", weights_only=True)["average"]
        del average["n_averaged"]
        weights = {name.removeprefix("module."): value for name, value in average.items()}
    else:
        weights = load_bundle(run).weights
    patch_shape = STAGES[-1][2]
    network = NetworkSpec(filters=FILTERS)
    new = NewBundle(network, patch_shape, 0.25, epoch, VOXEL_SIZE_UM)
    checkpoint = save_bundle(bundle, new, weights, half=True)
    if n_calibration:
        calibration = calibrate_bundle(str(bundle), n_calibration)
        print(calibration)
        weights = fold(weights, calibration.scale, calibration.shift)
        save_bundle(bundle, new, weights, half=True)
    # The package ships its record, so that planning with it needs no torch.
    write_record(record_of(bundle), bundle / "facts.json")
    return checkpoint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--epoch", type=int, default=1)
    parser.add_argument(
        "--calibrate",
        type=int,
        nargs="?",
        const=N_IMAGES,
        default=0,
        metavar="N",
        help=f"on N simulations of each kind ({N_IMAGES})",
    )
    args = parser.parse_args()
    print(export(args.run, args.bundle, args.epoch, args.calibrate))

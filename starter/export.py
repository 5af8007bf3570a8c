"""Write the bundle of a training as the starter: in half precision, with its voxel sizes.

    python -m starter.export BUNDLE megaseg_dask/models/starter [--calibrate]

BUNDLE is what `megaseg train` wrote. `--calibrate` gives the logits the scale and shift
of `calibrate.py`.
"""

# ruff: noqa: T201 - a command of its own: its result is what it prints

import argparse
from pathlib import Path

from megaseg_dask.models import NewBundle, load_bundle, save_bundle
from megaseg_dask.models.cards import MEGASEG_VOXEL_SIZE_UM
from megaseg_dask.models.facts import record_of, write_record
from starter.calibrate import N_IMAGES, calibrate_bundle, fold
from starter.simulation import VOXEL_YX_UM, VOXEL_Z_UM

OVERLAP = 0.25
_EPOCH = 1
_SMALLEST, _LARGEST = zip(VOXEL_Z_UM, VOXEL_YX_UM, VOXEL_YX_UM, strict=True)


def export(trained: Path, bundle: Path, n_calibration: int = 0) -> Path:
    """Return the path of the checkpoint that was written.

    ``n_calibration`` is how many images of each kind calibrate it; with 0 it stays as it is.
    """
    learnt = load_bundle(trained)
    new = NewBundle(
        learnt.network,
        learnt.patch_shape,
        OVERLAP,
        _EPOCH,
        # Simulated images have voxels of many sizes around those of MegaSeg.
        MEGASEG_VOXEL_SIZE_UM,
        (_SMALLEST, _LARGEST),
    )
    checkpoint = save_bundle(bundle, new, learnt.weights, half=True)
    if n_calibration:
        calibration = calibrate_bundle(str(bundle), n_calibration)
        print(calibration)
        folded = fold(learnt.weights, calibration.scale, calibration.shift)
        save_bundle(bundle, new, folded, half=True)
    # The package ships its record, so that planning with it needs no torch.
    write_record(record_of(bundle), bundle / "facts.json")
    return checkpoint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trained", type=Path)
    parser.add_argument("bundle", type=Path)
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
    print(export(args.trained, args.bundle, args.calibrate))

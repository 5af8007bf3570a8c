"""The folder of a training: a bundle once it is done, and before that our working files.

All that cyto-dl needs and writes is in ``OUT/training``. Its last checkpoint lets
the same command continue; the best one becomes the bundle when training is over.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megaseg_dask.errors import (
    MegasegError,
    SettingsError,
    SourceError,
    StoreError,
    TargetError,
)
from megaseg_dask.models.cytodl.files import CONFIG
from megaseg_dask.models.cytodl.write import with_voxel_size

BUNDLE_FILES = (CONFIG, "metrics.csv", "curves.png")
CARD = "MODEL_CARD.md"
CHECKPOINTS = "checkpoints"
_RECORD = "request.json"


class TrainingFolder:
    """OUT, and the working files in ``OUT/training``."""

    def __init__(self, out: str) -> None:
        self.out = Path(out).expanduser().absolute()
        self.work = self.out / "training"
        # Not "checkpoints": a training that is not over is no bundle.
        self.states = self.work / "states"
        self.data = self.work / "data"
        self.cache = self.work / "cache"
        self.log = self.work / "log.txt"

    @property
    def last_state(self) -> Path:
        """The checkpoint of the last epoch, from which a training continues."""
        return self.states / "last.ckpt"

    def has_bundle(self) -> bool:
        """Return whether a bundle was published here."""
        return (self.out / CHECKPOINTS).is_dir()

    # -- who owns it

    def require_free(self, identity: Mapping[str, object], *, overwrite: bool) -> None:
        """Require a folder that is new, empty, or of the same training (of any, with overwrite).

        Raises:
            TargetError: for any other folder.
        """
        try:
            is_empty = not self.out.exists() or not any(self.out.iterdir())
        except OSError as error:
            raise TargetError(
                f"{self.out} is not a folder to write to: {error.strerror}"
            ) from error
        if is_empty:
            return
        record = self.read_record()
        if record is None:
            advice = "choose a new or empty folder"
            raise TargetError(f"{self.out} contains other files than a training; {advice}")
        # A record was JSON, which has no tuples.
        expected = json.loads(json.dumps(identity))
        differing = [key for key, value in expected.items() if record.get(key) != value]
        if differing and not overwrite:
            difference = "other options, another recipe or other images"
            if differing == ["examples"]:
                difference = "other images, or with files that have changed since"
            advice = "choose another folder, or pass --overwrite"
            raise TargetError(f"{self.out} holds a training with {difference}; {advice}")

    def require_more_epochs(self, max_epochs: int) -> None:
        """Require at least as many epochs as are trained.

        Raises:
            SettingsError: if more epochs are trained.
        """
        table = self.work / "metrics.csv"
        if not table.exists():
            return
        n_trained = len(table.read_text().splitlines()) - 1
        if max_epochs < n_trained:
            advice = "give at least as many to resume, or start again with --overwrite"
            problem = f"{n_trained} epochs are trained already"
            raise SettingsError(f"--max-epochs {max_epochs}: {problem}; {advice}")

    # -- the record

    def read_record(self) -> dict[str, Any] | None:
        """Return the record of the training; ``None`` if there is none."""
        try:
            return dict(json.loads((self.work / _RECORD).read_text()))
        except (OSError, ValueError):
            return None

    def write_record(self, record: Mapping[str, object]) -> None:
        """Replace the record of the training."""
        part = self.work / f"{_RECORD}.part"
        part.write_text(json.dumps(record, indent=1))
        part.replace(self.work / _RECORD)

    # -- files come and go

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Name the folder if it cannot be written, and leave nothing of a training that is refused.

        Raises:
            StoreError: if the folder cannot be written.
        """
        is_new = not self.out.exists()
        work_is_new = not self.work.exists()
        try:
            yield
        except (SettingsError, SourceError):
            if work_is_new:
                shutil.rmtree(self.work, ignore_errors=True)
            if is_new:
                with suppress(OSError):
                    self.out.rmdir()
            raise
        except MegasegError:
            raise
        except OSError as error:
            cause = error.strerror or error
            advice = "free some space or fix the cause, and run the same command again"
            raise StoreError(f"{self.out} cannot be written: {cause}; {advice}") from error

    def clear(self) -> None:
        """Remove what an earlier training wrote, and nothing else."""
        for folder in (self.out / CHECKPOINTS, self.states, self.cache, self.data):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (*BUNDLE_FILES, CARD):
            (self.out / name).unlink(missing_ok=True)
        for name in (_RECORD, "metrics.csv"):
            (self.work / name).unlink(missing_ok=True)

    def remove_data(self) -> None:
        """Remove the copies of the images, once the training is over."""
        for folder in (self.cache, self.data):
            shutil.rmtree(folder, ignore_errors=True)

    def publish(
        self, checkpoint: Path, voxel_size_um: tuple[float, float, float] | None = None
    ) -> None:
        """Make the folder a bundle: its configuration and curves, then the best checkpoint.

        The configuration tells the size of the images' voxels, if it is known. The checkpoint comes
        last and at once: a folder without it is no bundle.
        """
        import yaml

        for name in BUNDLE_FILES:
            shutil.copyfile(self.work / name, self.out / name)
        if voxel_size_um is not None:
            config = self.out / CONFIG
            told = with_voxel_size(yaml.safe_load(config.read_text()), voxel_size_um)
            config.write_text(yaml.safe_dump(told, sort_keys=False))
        part = self.work / "checkpoints.part"
        for folder in (part, self.out / CHECKPOINTS):
            shutil.rmtree(folder, ignore_errors=True)
        part.mkdir()
        shutil.copyfile(checkpoint, part / checkpoint.name)
        part.replace(self.out / CHECKPOINTS)

"""Settings with nothing left open: what the planner decides once, and all else reads.

All that can change the output is here, typed. How these values are recorded in an
output, and compared with those of another run, is :meth:`Resolved.options`.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from megaseg_dask.algorithms.geometry import Box, Shape
from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine import EngineSpec
from megaseg_dask.plan.settings import Settings

# µm; chosen on labelled nuclei (docs/decisions.md).
DEFAULT_SPLIT_DEPTH = 0.75

_LEVEL = "level:"
_DATA = "data"


@dataclass(frozen=True, slots=True)
class OfVolume:
    """Mean and standard deviation of all voxels of each volume."""


@dataclass(frozen=True, slots=True)
class OfLevel:
    """Mean and standard deviation of each volume at a level of the source."""

    level: int


@dataclass(frozen=True, slots=True)
class OfGroup:
    """Mean and standard deviation of all voxels of a group of volumes.

    ``kind`` is series, well, acquisition or plate.
    """

    kind: str


@dataclass(frozen=True, slots=True)
class Given:
    """The same mean and standard deviation for all volumes."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Fixed:
    """A voxel is foreground if its score, from 0 to 1, is above this."""

    score: float


@dataclass(frozen=True, slots=True)
class Automatic:
    """The threshold of each volume is found from its logits, by a method of this name."""

    method: str


# Longer forms first: of a recorded value, the form whose fields are all there is meant.
NormalizationSource: TypeAlias = Given | OfLevel | OfGroup | OfVolume
Threshold: TypeAlias = Fixed | Automatic


def normalization_of(settings: Settings) -> NormalizationSource:
    """Return where mean and standard deviation of a volume come from."""
    match settings.normalization:
        case None:
            return OfVolume()
        case str(text) if text.startswith(_LEVEL):
            return OfLevel(int(text.removeprefix(_LEVEL)))
        case str(kind):
            return OfGroup(kind)
        case (mean, std):
            return Given(mean, std)


def split_depth_of(settings: Settings) -> float | None:
    """Return the depth in µm of cuts between objects; ``None`` if there are none."""
    if settings.split == "none":
        return None
    return settings.split_depth or DEFAULT_SPLIT_DEPTH


def threshold_of(settings: Settings) -> Threshold:
    """Return the threshold, or how it is found."""
    if isinstance(settings.threshold, str):
        return Automatic(settings.threshold)
    return Fixed(settings.threshold)


@dataclass(frozen=True, slots=True)
class Where:
    """A mask by its name or address, outside which nothing is predicted, and a margin around it."""

    text: str
    margin_um: float = 0.0

    @property
    def is_data(self) -> bool:
        """Whether the mask is the chunks that the source has."""
        return self.text == _DATA


def where_of(settings: Settings) -> Where | None:
    """Return where to predict; ``None`` is everywhere.

    Raises:
        SettingsError: There is a margin without a mask.
    """
    if settings.where is None:
        if settings.where_margin:
            raise SettingsError("--where-margin: it needs a mask; give one with --where")
        return None
    return Where(settings.where, settings.where_margin)


@dataclass(frozen=True, slots=True)
class Basis:
    """What a run labels again: the scores of an earlier run on the same target, or its logits.

    ``run`` is the name of the folder of that run, and ``fingerprint`` that of its plan.
    """

    run: str
    fingerprint: str
    kind: Literal["scores", "logits"]
    dtype: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """All settings that can change the output.

    ``channels`` and ``times`` (half-open) are indices in the source, ``level`` is one of its
    levels, and ``roi`` is in voxels ``(z, y, x)`` of that level, as is ``block``. The network sees
    voxels of ``voxel_size_um`` (z, y, x), of which ``patch`` is; ``None`` are the source's own.
    """

    channels: tuple[int, ...]
    times: tuple[int, int]
    level: int
    roi: Box | None
    voxel_size_um: tuple[float, ...] | None
    where: Where | None
    nan_to_background: bool
    missing_chunks: str
    normalization: NormalizationSource
    patch: Shape
    overlap: tuple[float, ...]
    engine: EngineSpec
    batch: int
    outputs: tuple[str, ...]
    # Channels that are measured by themselves, beside the one that is segmented.
    measure_channels: tuple[int, ...]
    regions: str | None
    table: str
    threshold: Threshold
    connectivity: int
    min_size: int
    fill_holes: int
    # µm; ``None`` if objects that touch stay one.
    split_depth: float | None
    scores_dtype: str
    keep_logits: bool
    label_name: str
    ome_zarr: str
    block: Shape
    # Set where nothing is predicted.
    basis: Basis | None = None

    # -- what follows from them

    def predicts(self) -> bool:
        """Return whether the network runs; else scores that are there are read."""
        return self.basis is None

    def rereads(self) -> bool:
        """Return whether scores or logits of an earlier run are read."""
        return self.basis is not None

    def has_rounded_basis(self) -> bool:
        """Return whether scores of 8 bits are read: thresholds are then those of rounded scores."""
        basis = self.basis
        return basis is not None and basis.kind == "scores" and basis.dtype == "uint8"

    def has_mask(self) -> bool:
        """Return whether scores are turned into a mask."""
        return bool({"labels", "mask"} & set(self.outputs))

    def finds_threshold(self) -> bool:
        """Return whether the threshold of each volume is found from its logits."""
        return isinstance(self.threshold, Automatic) and self.has_mask()

    def fills_holes(self) -> bool:
        """Return whether holes of the mask are filled."""
        return self.fill_holes > 0 and self.has_mask()

    def splits_objects(self) -> bool:
        """Return whether objects that touch are taken apart."""
        return self.split_depth is not None and self.writes_labels()

    def writes_labels(self) -> bool:
        """Return whether objects are labelled."""
        return "labels" in self.outputs

    def measures_objects(self) -> bool:
        """Return whether objects are measured."""
        return "measurements" in self.outputs

    def measures_voxels(self) -> bool:
        """Return whether voxels are read to find mean and standard deviation."""
        return self.predicts() and not isinstance(self.normalization, Given)

    def pools_statistics(self) -> bool:
        """Return whether volumes of a group have one mean and standard deviation."""
        return self.predicts() and isinstance(self.normalization, OfGroup)

    # -- as they are recorded

    def options(self) -> dict[str, object]:
        """Return the options that give these values, as JSON values, in their declared order."""
        engine = self.engine
        return {
            # By index: another channel may later get the name.
            "channel": ",".join(map(str, self.channels)),
            "time": list(self.times),
            "level": self.level,
            "roi": self._roi_option(),
            "voxel_size": list(self.voxel_size_um) if self.voxel_size_um else "source",
            "where": self.where.text if self.where else None,
            "where_margin": self.where.margin_um if self.where else 0.0,
            "nan_to_background": self.nan_to_background,
            "missing_chunks": self.missing_chunks,
            "normalization": self._normalization_option(),
            "tta": engine.tta,
            "patch": list(self.patch),
            "overlap": list(self.overlap),
            "engine": engine.engine,
            "device": engine.device,
            "precision": engine.precision,
            "batch": self.batch,
            "threads": engine.threads,
            "outputs": list(self.outputs),
            "measure_channels": ",".join(map(str, self.measure_channels)) or None,
            "regions": self.regions,
            "table": self.table,
            "threshold": self._threshold_option(),
            "connectivity": self.connectivity,
            "min_size": self.min_size,
            "fill_holes": self.fill_holes,
            "split": "none" if self.split_depth is None else "distance",
            "split_depth": self.split_depth,
            "scores_dtype": self.scores_dtype,
            "keep_logits": self.keep_logits,
            "label_name": self.label_name,
            "ome_zarr": self.ome_zarr,
            "block": list(self.block),
        }

    def _roi_option(self) -> list[list[int]] | None:
        if self.roi is None:
            return None
        return [list(limits) for limits in zip(self.roi.start, self.roi.stop, strict=True)]

    def _normalization_option(self) -> list[float] | str | None:
        match self.normalization:
            case OfVolume():
                return None
            case OfLevel(level):
                return f"{_LEVEL}{level}"
            case OfGroup(kind):
                return kind
            case Given(mean, std):
                return [mean, std]

    def _threshold_option(self) -> float | str:
        match self.threshold:
            case Fixed(score):
                return score
            case Automatic(method):
                return method

    def as_settings(self, settings: Settings) -> Settings:
        """Return settings with all that was left open in them replaced by these values."""
        options = self.options()
        # A name means the right channel in each field of a plate; an index does not.
        for name in ("channel", "measure_channels"):
            options[name] = getattr(settings, name) or options[name]
        return Settings.model_validate({**settings.model_dump(), **options})

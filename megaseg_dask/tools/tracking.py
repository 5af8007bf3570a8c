"""Tracks of a timelapse: objects of a finished run are linked from timepoint to timepoint.

Voxels that labels of neighboring timepoints share are counted block by block; such counts add, so
an image of any size can be tracked. Centroids and sizes are those of the table of measurements,
which gets the ids of tracks as columns. The graph of all links is written as GEFF beside TARGET.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.chunking import Layout
from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.algorithms.matching import Contingency
from megaseg_dask.algorithms.measurements import TRACK_COLUMNS
from megaseg_dask.algorithms.tracking import (
    Drift,
    Frame,
    Linking,
    Links,
    Tracks,
    link_frames,
)
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import MegasegError, SettingsError, SourceError, TargetError
from megaseg_dask.events import Emit, Step, ignore
from megaseg_dask.messages import version_of
from megaseg_dask.ngff.image import SPATIAL, Image
from megaseg_dask.ngff.labels import read_label_image, require_complete
from megaseg_dask.ngff.tables import ImageTable
from megaseg_dask.ngff.tracks import (
    SUFFIX,
    TrackGraph,
    require_geff,
    require_own_tracks,
    write_tracks,
)
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.run.finished import find_loss
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held, Leases
from megaseg_dask.run.losses import find_lost_volumes
from megaseg_dask.run.runner import LEASE_TIMING
from megaseg_dask.run.status import find_plans, unread_fields
from megaseg_dask.run.target.arrays import Group, Target
from megaseg_dask.run.target.tables import rewrite_run_table, write_track_columns
from megaseg_dask.run.target.tracks import tracks_of
from megaseg_dask.stores import Location

# Voxels of a block at most: two timepoints of it, and what counts them, take 150 MB.
_MAX_BLOCK_VOXELS = 2**22
_MAX_THREADS = 8
# Objects drift if more of them than this share have no partner within reach, or if all move
# together by more than this share of the reach.
_MOST = 0.5
# Times that a progress of one image is told.
_N_STEPS = 10
_MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class TrackedLabels:
    """What was found of one label image; distances are in ``unit``, µm or voxels."""

    image: str
    labels: str
    tracks: str
    timepoints: int
    objects: int
    n_tracks: int
    links: int
    splits: int
    merges: int
    max_distance: float
    unit: str


@dataclass(slots=True)
class Tracking:
    """What a command did: label images with tracks, and what failed or should not be believed."""

    target: str
    table: str = ""
    tracked: list[TrackedLabels] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """Return all fields by name, ready for JSON."""
        return asdict(self)


def track(
    target: str,
    *,
    label_name: str | None = None,
    max_distance: float | None = None,
    splits: bool = True,
    merges: bool = False,
    emit: Emit = ignore,
) -> Tracking:
    """Link the objects of a finished run through its timepoints.

    ``max_distance`` is in µm (in voxels where their size is unknown), by default the median
    diameter of the objects; with 0 only objects are linked that share voxels. Fields of a plate
    that cannot be tracked are named among the failures, and the others are tracked.

    Raises:
        SettingsError: A run has to be chosen, an option is wrong, or a package is missing.
        SourceError: The run has a single timepoint.
        TargetError: No run is recorded there, it is not finished, or another process works on it.
        MegasegError: The labels of a single image cannot be tracked.
    """
    require_geff()
    if max_distance is not None and not 0 <= max_distance < math.inf:
        raise SettingsError(f"--max-distance {max_distance}: expected 0 or more µm")
    where = Location.of(target)
    _require_trackable(find_plans(target, label_name))
    where.require_writable()
    with Leases(runs_folder(where), LEASE_TIMING).hold() as lease:
        plans = find_plans(target, label_name)
        _require_trackable(plans)
        result = Tracking(target)
        tracker = _Tracker(max_distance, splits, merges, lease, emit, result)
        for plan in plans:
            result.failures += [f"{lost.volume}: {lost.error}" for lost in unread_fields(plan)]
            if len(plan.times) < 2:
                fields = ", ".join(plan.field_paths)
                result.warnings.append(f"{fields}: one timepoint, so there is nothing to track")
                continue
            tracker.track_run(plan)
        if not result.tracked:
            return result
        emit(Step("writing the table of the run"))
        lease.require()
        result.table = str(rewrite_run_table(plans, {"tracks": tracker.provenance}))
    return result


def _require_trackable(plans: Sequence[Plan]) -> None:
    if all(len(plan.times) < 2 for plan in plans):
        raise SourceError(
            f"{plans[0].target} has one timepoint, and tracks need several; segment a timelapse, "
            "with more than one timepoint in --time"
        )
    for plan in plans:
        again = f"run the same megaseg {_command(plan)} command again first"
        if not plan.resolved.measures_objects():
            raise SettingsError(_advise_measurements(plan))
        journal = Journal.read(plan)
        if journal.result is None and not _has_failed_fields(plan, journal):
            raise TargetError(f"{plan.target}: run {plan.run.basename} is not finished; {again}")
        if lost := find_loss(plan, journal):
            raise TargetError(f"{plan.target}: {lost}; {again}")


def _has_failed_fields(plan: Plan, journal: Journal) -> bool:
    """Return whether all fields of a plate were tried, and some failed."""
    if plan.plate is None:
        return False
    failed = {plan.split_index(*task)[0] for task in journal.failed}
    is_tried = all(
        volume in failed or journal.is_complete(volume) for volume in range(len(plan.volumes))
    )
    return is_tried and bool(failed or unread_fields(plan))


def _failed_fields(plan: Plan) -> dict[str, str]:
    """Return the fields of a run that are not whole, and why."""
    journal = Journal.read(plan)
    if journal.result is not None:
        return {}
    again = f"run the same megaseg {_command(plan)} command again"
    failures = {plan.split_index(*task)[0]: each for task, each in journal.failed.items()}
    lost = find_lost_volumes(plan, journal)
    reasons: dict[str, str] = {}
    for number, volume in enumerate(plan.volumes):
        if number in lost:
            reasons[volume.image] = f"what it wrote was removed or changed since; {again}"
        elif not journal.is_complete(number):
            failure = failures.get(number)
            reason = f"megaseg {_command(plan)} failed: {failure.error}" if failure else ""
            reasons[volume.image] = reason or f"it is not finished; {again}"
    return reasons


def _command(plan: Plan) -> str:
    return "segment" if plan.resolved.predicts() else "relabel"


def _advise_measurements(plan: Plan) -> str:
    name = plan.resolved.label_name
    problem = f"{plan.target}: run {name} has no measurements, which tracks are made of"
    if not plan.resolved.writes_labels() or plan.is_in_place:
        return f"{problem}; run megaseg segment with labels,measurements among --outputs"
    return (
        f"{problem}; write them with megaseg relabel {plan.target} --label-name {name}-measured "
        f"--outputs labels,measurements, then track --label-name {name}-measured"
    )


@dataclass(frozen=True, slots=True)
class _Tracker:
    max_distance: float | None
    splits: bool
    merges: bool
    lease: Held
    emit: Emit
    result: Tracking

    @property
    def provenance(self) -> dict[str, object]:
        version = version_of("megaseg-dask")
        return {"megaseg-dask": version, "splits": self.splits, "merges": self.merges}

    def track_run(self, plan: Plan) -> None:
        failed = _failed_fields(plan)
        self.result.failures += [f"{field}: {reason}" for field, reason in failed.items()]
        groups = [
            group
            for image in Target(plan).images
            if image.path not in failed
            for group in image.measured_groups
        ]
        for number, group in enumerate(groups, 1):
            name = tracks_of(plan, group).basename.removesuffix(SUFFIX)
            self.emit(Step(f"tracking {name} ({number} of {len(groups)})"))
            try:
                self._track_labels(plan, group, name if plan.plate else f"labels {name}")
            except MegasegError as error:
                if plan.plate is None:
                    raise
                self.result.failures.append(f"{name}: {error}")

    def _track_labels(self, plan: Plan, group: Group, name: str) -> None:
        file = tracks_of(plan, group)
        require_own_tracks(file)
        labels = read_label_image(group.location)
        require_complete(group.location, labels)
        objects = _Objects.read(plan, group, labels)
        distance = self.max_distance
        if distance is None:
            distance = objects.median_diameter()
        blocks = BlockGrid(plan.volume_shape, _block_shape(plan.volume_shape, plan.layout(0)))
        overlaps = count_overlaps(group.location, labels, blocks, partial(self._tell, name))
        linking = Linking(distance, self.splits, self.merges)
        links: list[Links] = []
        drifts: list[Drift | None] = []
        for (before, after), table in zip(objects.neighbors(), overlaps, strict=True):
            found, drift = link_frames(before, after, table, linking)
            links.append(found)
            drifts.append(drift)
        tracks = Tracks.of([len(frame) for frame in objects.frames], links)
        unit = "µm" if objects.is_in_um else "voxels"
        if self.max_distance and not objects.is_in_um:
            self.result.warnings.append(
                f"{name}: the size of its voxels is unknown, so --max-distance "
                f"{self.max_distance:g} is taken as voxels"
            )
        self._warn(name, drifts, distance, unit, objects)
        self.lease.require()
        provenance = {**self.provenance, "max_distance": distance, "unit": unit}
        write_tracks(
            file,
            _graph_of(objects, tracks),
            labels_path=_relative(group.location, file),
            provenance=provenance,
        )
        self.lease.require()
        write_track_columns(plan, group, objects.columns_of(tracks), {"tracks": provenance})
        self.result.tracked.append(
            TrackedLabels(
                image=str(group.image),
                labels=group.name,
                tracks=str(file),
                timepoints=len(objects.frames),
                objects=len(tracks.track),
                n_tracks=tracks.n_tracks,
                links=len(tracks.source),
                splits=tracks.n_splits,
                merges=tracks.n_merges,
                max_distance=distance,
                unit=unit,
            )
        )

    def _tell(self, name: str, done: int, n_blocks: int) -> None:
        if n_blocks > _N_STEPS and done % math.ceil(n_blocks / _N_STEPS) == 0:
            self.emit(Step(f"tracking {name}: read {100 * done // n_blocks} %"))

    def _warn(
        self,
        name: str,
        drifts: Sequence[Drift | None],
        distance: float,
        unit: str,
        objects: "_Objects",
    ) -> None:
        far = [t for t, drift in enumerate(drifts) if drift and drift.unreached > _MOST]
        if far:
            nearest = np.median([drift.nearest for t in far if (drift := drifts[t])])
            self.result.warnings.append(
                f"{name}: most objects have no partner within {distance:.3g} {unit} {_after(far)}; "
                f"the nearest object is {nearest:.3g} {unit} away (median). Align the timepoints, "
                "or give a larger --max-distance"
            )
        moved = [
            t
            for t, drift in enumerate(drifts)
            if drift and t not in far and drift.shift > _MOST * distance > 0
        ]
        if moved:
            shift = np.median([drift.shift for t in moved if (drift := drifts[t])])
            self.result.warnings.append(
                f"{name}: all objects move together {_after(moved)}, by {shift:.3g} {unit} "
                f"(median). This is more than half of --max-distance, {distance:.3g} {unit}, so "
                "links may be wrong. Align the timepoints first"
            )
        empty = [t for t, frame in enumerate(objects.frames) if not len(frame)]
        if empty:
            self.result.warnings.append(
                f"{name}: no objects at {_timepoints(empty)}; all tracks end there"
            )


def _after(times: Sequence[int]) -> str:
    return f"after {_timepoints(times)}"


def _timepoints(times: Sequence[int]) -> str:
    named = ", ".join(map(str, times[:_MAX_NAMED]))
    more = f" and {len(times) - _MAX_NAMED} more" if len(times) > _MAX_NAMED else ""
    return f"{'timepoint' if len(times) == 1 else 'timepoints'} {named}{more}"


def _relative(location: Location, base: Location) -> str:
    """Return the way from the group ``base`` to another one, both beside each other's parents."""
    return os.path.relpath(location.url, base.url)


# -- objects


@dataclass(frozen=True, slots=True)
class _Objects:
    """The objects of one label image, timepoint by timepoint.

    Centroids are in µm if the voxel size is known, else in voxels. ``origin`` is where the first
    voxel lies.
    """

    frames: list[Frame]
    is_in_um: bool
    voxel_size: float
    origin: NDArray[np.float64]

    @classmethod
    def read(cls, plan: Plan, group: Group, labels: Image) -> "_Objects":
        spacing = plan.known_spacing_um
        unit = "_um" if spacing else ""
        n_times = labels.extent("t")
        empty = Frame(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty((0, 3)))
        frames = [empty] * n_times
        for t, _, columns in ImageTable(group.image, group.name).iter_volumes():
            centroid = np.stack([columns[f"centroid_{axis}{unit}"] for axis in SPATIAL], axis=1)
            label = columns["label"].astype(np.uint64)
            frames[t] = Frame(label, columns["volume_voxels"], centroid)
        origin = np.array(labels.origin_um) if spacing else np.zeros(3)
        size = math.prod(spacing or (1.0,))
        return cls(frames, spacing is not None, size, origin)

    def neighbors(self) -> Iterator[tuple[Frame, Frame]]:
        """Yield the objects of each timepoint with those of the next one."""
        return zip(self.frames[:-1], self.frames[1:], strict=True)

    def median_diameter(self) -> float:
        """Return the median of the diameters of balls of the objects' volumes."""
        n_voxels = np.concatenate([frame.n_voxels for frame in self.frames])
        if not len(n_voxels):
            return 0.0
        return float(np.cbrt(6 * np.median(n_voxels) * self.voxel_size / np.pi))

    def columns_of(self, tracks: Tracks) -> dict[int, dict[str, NDArray[np.int64]]]:
        """Return the columns of tracks of each timepoint."""
        columns: dict[int, dict[str, NDArray[np.int64]]] = {}
        start = 0
        for t, frame in enumerate(self.frames):
            part = slice(start, start + len(frame))
            values = (tracks.track[part], tracks.parent[part], tracks.lineage[part])
            columns[t] = dict(zip(TRACK_COLUMNS, values, strict=True))
            start += len(frame)
        return columns


def _graph_of(objects: _Objects, tracks: Tracks) -> TrackGraph:
    frames = objects.frames
    place = np.concatenate([frame.centroid for frame in frames]) + objects.origin
    times = np.repeat(np.arange(len(frames)), [len(frame) for frame in frames])
    nodes = {
        "t": times,
        **{name: np.ascontiguousarray(place[:, axis]) for axis, name in enumerate("zyx")},
        "label": np.concatenate([frame.label for frame in frames]),
        "volume_voxels": np.concatenate([frame.n_voxels for frame in frames]),
        "track_id": tracks.track,
        "parent_track_id": tracks.parent,
        "lineage_id": tracks.lineage,
    }
    links = np.stack([tracks.source, tracks.target], axis=1)
    columns = {"overlap": tracks.overlap, "distance": tracks.distance}
    unit = "micrometer" if objects.is_in_um else ""
    return TrackGraph(nodes, links, columns, unit)


# -- overlaps


def count_overlaps(
    location: Location, labels: Image, blocks: BlockGrid, tell: Callable[[int, int], None]
) -> list[Contingency]:
    """Return how many voxels labels of each timepoint share with those of the next one."""
    boxes = list(blocks)
    totals = [Contingency.none()] * (labels.extent("t") - 1)
    n_threads = min(_MAX_THREADS, os.cpu_count() or 1)
    read = partial(overlaps_in, location, labels)
    for start in range(0, len(boxes), n_threads):
        for tables in map_threaded(read, boxes[start : start + n_threads], n_threads):
            totals = [total + table for total, table in zip(totals, tables, strict=True)]
        tell(min(start + n_threads, len(boxes)), len(boxes))
    return totals


def overlaps_in(location: Location, labels: Image, box: Box) -> list[Contingency]:
    """Return the tables of a box, of each pair of neighboring timepoints; voxels are read once."""
    tables = []
    before = Volume.of(location, labels, t=0).read(box)
    for t in range(1, labels.extent("t")):
        after = Volume.of(location, labels, t=t).read(box)
        tables.append(Contingency.of(before, after))
        before = after
    return tables


def _block_shape(volume_shape: Shape, layout: Layout) -> Shape:
    """Return blocks of whole chunks, so that each is read once."""
    block = list(layout.chunk_shape)
    while math.prod(block) < _MAX_BLOCK_VOXELS:
        # The axis that is covered least grows.
        shares = [extent / n for extent, n in zip(block, volume_shape, strict=True)]
        if min(shares) >= 1:
            break
        block[shares.index(min(shares))] *= 2
    return tuple(block)

"""What the report knows of each volume: objects, foreground, scores, and why it is an outlier.

The journal and the table of measurements are exact, and are read first. What they
lack is measured in the outputs, within a budget of voxels for all runs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import max_score, sigmoid
from megaseg_dask.algorithms.doubts import OUTLIER_Z, robust_z
from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.ngff.tables import iter_columns
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.plan.resolved import Fixed
from megaseg_dask.run.conclude import state_of
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.state import TaskSummary, VolumeState
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.tools.report.sampling import (
    UNREADABLE,
    View,
    choose_view,
    spread,
    voxels_per_voxel,
    whole_or_middle,
)

Array = NDArray[Any]

# Voxels that are read of all volumes together, and the limits of those of one.
_ALL_VOXELS = 2**28
_MIN_VOXELS = 2**17
_MAX_VOXELS = 2**24
_MAX_VOLUMES = 2**11
_READERS = 8

# Scores are counted at the finest level: averaged voxels are nearer to the middle.
_SAMPLE_SHAPE = (64, 128, 128)
_MAX_SAMPLES = 64
N_SCORE_BINS = 51

# Eight bins per factor of ten, up to 10^12 voxels.
SIZE_EDGES = 10 ** (np.arange(0, 12 * 8 + 1) / 8)

# The measures that make outliers, and the words for too much and too little.
_OUTLIER_MEASURES = (
    ("objects", "many objects", "few objects"),
    ("foreground", "high foreground", "low foreground"),
    ("mean_score", "high mean score", "low mean score"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One of the runs that made a target; a plate may have several."""

    plan: Plan
    journal: Journal
    number: int = 0


@dataclass
class VolumeReport:
    """One output of one volume; a value is ``None`` where it was not measured.

    ``mean`` and ``std`` are of the image; ``mean_score`` and ``threshold`` are between 0 and 1.
    """

    run: Run
    output: Output
    objects: int | None = None
    foreground: float | None = None
    mean_score: float | None = None
    mean: float | None = None
    std: float | None = None
    is_constant: bool = False
    threshold: float | None = None
    failures: list[str] = field(default_factory=list)
    outlier_reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.run.plan
        volume = plan.volumes[self.output.volume]
        outputs = plan.model.outputs
        self.image = volume.image
        self.t = volume.t
        output_name = outputs[self.output.number] if len(outputs) > 1 else ""
        # The key of the volume in the table of measurements.
        self.place = (volume.image, volume.target_t, volume.c, output_name)
        # Channel and output, if there are several.
        has_channels = len(plan.suffixes) > len(outputs)
        channel_name = plan.channel_name(volume.image, volume.c) if has_channels else ""
        self.channel = " ".join(filter(None, [channel_name, output_name]))
        has_time = plan.source_image.extent("t") > 1
        words = [self.image, f"t={self.t}" if has_time else "", self.channel]
        self.name = " ".join(filter(None, words)) or "the image"
        self.anchor = f"v{self.run.number}-{self.output.volume}-{self.output.number}"

    @property
    def failed(self) -> float:
        """1 if a task of the volume failed, else 0."""
        return float(bool(self.failures))

    @property
    def stands_out(self) -> bool:
        """Whether the volume failed or is an outlier."""
        return bool(self.failures or self.outlier_reasons)


@dataclass
class Survey:
    """All volumes of a target, and their histograms; ``notes`` say what was sampled."""

    volumes: list[VolumeReport]
    sizes: Array = field(default_factory=lambda: np.zeros(len(SIZE_EDGES) - 1, np.int64))
    scores: Array = field(default_factory=lambda: np.zeros(N_SCORE_BINS, np.int64))
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)


def survey(runs: Sequence[Run]) -> Survey:
    """Measure the volumes of all runs on a target; unreadable data are noted, never an error."""
    by_run = [_read_journal(run) for run in runs]
    result = Survey(list(chain(*by_run)))
    has_table = _read_table(runs[0].plan, result)
    for run, reports in zip(runs, by_run, strict=True):
        _measure_samples(run.plan, reports, result, len(runs), has_table=has_table)
        _count_scores(run.plan, reports, result, len(runs))
    _find_outliers(result.volumes)
    return result


# -- the journal


def _read_journal(run: Run) -> list[VolumeReport]:
    """Return a report of each output of each volume, with the results of its tasks."""
    plan = run.plan
    summaries = _summaries(run)
    states: Mapping[int, VolumeState | TaskSummary | None] = summaries
    if not plan.is_one_task:
        chosen = spread(len(plan.volumes), _MAX_VOLUMES)
        states = {volume: state_of(plan, run.journal, volume) for volume in chosen}
    failures = defaultdict(list)
    for (stage, index), failure in sorted(run.journal.failed.items()):
        volume, _ = plan.split_index(stage, index)
        failures[volume].append(f"{stage} {failure.box}: {failure.error}")
    reports = []
    for volume in range(len(plan.volumes)):
        summary = summaries.get(volume) or TaskSummary()
        for output in plan.outputs_of(volume):
            report = VolumeReport(run, output, failures=list(failures[volume]))
            report.objects = summary.output(output.number).n_objects
            _add_statistics(report, states.get(volume))
            reports.append(report)
    return reports


def _summaries(run: Run) -> dict[int, TaskSummary | None]:
    """Return the summary of each volume's task that counts its objects; empty if there is none."""
    stage = run.plan.stage_telling("objects")
    return dict(enumerate(run.journal.by_index(stage.name))) if stage else {}


def _add_statistics(report: VolumeReport, state: VolumeState | TaskSummary | None) -> None:
    """Add the statistics of the first channel, and the threshold."""
    if state is None:
        return
    if state.statistics:
        report.mean = state.statistics[0].mean
        report.std = state.statistics[0].std
        report.is_constant = state.statistics[0].is_constant
    threshold = report.run.plan.resolved.threshold
    logit = state.output(report.output.number).threshold
    if isinstance(threshold, Fixed):
        report.threshold = threshold.score
    elif logit is not None:
        report.threshold = float(sigmoid(np.array([logit], np.float32))[0])


# -- the table


def _read_table(plan: Plan, result: Survey) -> bool:
    """Add up the table of measurements; return whether there is one that can be read."""
    if not plan.resolved.measures_objects():
        return False
    n_voxels = dict.fromkeys((report.place for report in result.volumes), 0)
    sizes = np.zeros_like(result.sizes)
    columns = ("well", "field", "timepoint", "channel", "output", "volume_voxels")
    try:
        for *keys, volumes in iter_columns(plan.table, columns):
            sizes += _size_histogram(volumes)
            for rows in _groups(keys):
                well, name, t, c, output = (column[rows[0]] for column in keys)
                image = f"{well}/{name}" if well else ""
                n_voxels[image, int(t), int(c), output or ""] += int(volumes[rows].sum())
    except (*UNREADABLE, KeyError) as error:
        result.note(f"The table of measurements could not be read: {error}.")
        return False
    for report in result.volumes:
        # The blocks of a failed task are zeros, which are no result.
        if report.objects is not None and not report.failures:
            report.foreground = n_voxels[report.place] / Box.of(report.run.plan.volume_shape).size
    result.sizes = sizes
    if any(report.failures for report in result.volumes):
        result.note("Objects beside blocks that failed are cut, in volume and number.")
    return True


def _groups(keys: Sequence[Array]) -> Iterator[Array]:
    """Yield the indices of consecutive rows with equal keys."""
    changes = [np.flatnonzero(column[1:] != column[:-1]) + 1 for column in keys]
    starts = np.unique(np.concatenate(changes))
    yield from filter(len, np.split(np.arange(len(keys[0])), starts))


def _size_histogram(n_voxels: Array) -> Array:
    return np.histogram(n_voxels, SIZE_EDGES)[0]


# -- the voxels


def _measure_samples(
    plan: Plan, reports: Sequence[VolumeReport], result: Survey, n_runs: int, *, has_table: bool
) -> None:
    """Measure scores, and without a table objects, at a level that fits the budget."""
    chosen = spread(len(reports), max(_MAX_VOLUMES // n_runs, 1))
    max_voxels = _ALL_VOXELS // n_runs // len(chosen)
    max_voxels = min(max(max_voxels, _MIN_VOXELS), _MAX_VOXELS)
    window = whole_or_middle(plan, max_voxels)
    view = choose_view(plan, window, max_voxels)
    measure = partial(_measure, view, "labels" in plan.arrays and not has_table)
    for sizes in map_threaded(measure, [reports[i] for i in chosen], _READERS):
        result.sizes += sizes
    if len(chosen) < len(reports):
        result.note(f"Foreground and mean scores are of {len(chosen)} of {len(reports)} volumes.")
    if window != Box.of(plan.volume_shape):
        result.note(
            "Foreground, mean scores and volumes of objects are of "
            f"{window}, the middle of each volume."
        )
    elif view.level:
        measures = "Mean scores" if has_table else "Foreground, mean scores and volumes of objects"
        result.note(f"{measures} are of level {view.level} of the pyramid.")


def _measure(view: View, measures_labels: bool, report: VolumeReport) -> Array:
    """Measure one volume; return the histogram of its objects."""
    plan = report.run.plan
    n_voxels = np.empty(0)
    # The blocks of a failed task are zeros, which are no result.
    if report.failures:
        return _size_histogram(n_voxels)
    try:
        if "scores" in plan.arrays:
            mean = view.read(plan, "scores", report.output).mean(dtype=np.float64)
            report.mean_score = float(mean) / max_score(plan.resolved.scores_dtype)
        if measures_labels:
            n_voxels = _object_sizes(view.read(plan, "labels", report.output))
            report.foreground = float(n_voxels.sum()) / view.box.size
    except UNREADABLE as error:
        report.failures.append(f"report: {error}")
    return _size_histogram(n_voxels * voxels_per_voxel(plan, view.level))


def _object_sizes(labels: Array) -> Array:
    """Return the number of voxels of each object."""
    if int(labels.max(initial=0)) <= 2 * labels.size:
        counts = np.bincount(labels.ravel().astype(np.intp, copy=False))[1:]
        return counts[counts > 0]
    ids, counts = np.unique(labels, return_counts=True)
    return counts[ids > 0]


def _count_scores(plan: Plan, reports: Sequence[VolumeReport], result: Survey, n_runs: int) -> None:
    """Count scores of the finest level in boxes spread over volumes, and over each of them."""
    complete = [report.output for report in reports if not report.failures]
    if "scores" not in plan.arrays or not complete:
        return
    grid = BlockGrid(plan.volume_shape, _SAMPLE_SHAPE)
    max_samples = max(_MAX_SAMPLES // n_runs, 1)
    volumes = spread(len(complete), max_samples)
    boxes = spread(len(grid), max(max_samples // len(volumes), 1))
    samples = [(complete[v], grid[b]) for v, b in product(volumes, boxes)]
    for counts in map_threaded(partial(_score_histogram, plan), samples, _READERS):
        result.scores += counts
    if len(samples) < len(complete) * len(grid):
        result.note(f"The histogram of scores is of {len(samples)} boxes of full resolution.")


def _score_histogram(plan: Plan, sample: tuple[Output, Box]) -> Array:
    output, box = sample
    edges = np.linspace(0, 1, N_SCORE_BINS + 1) * max_score(plan.resolved.scores_dtype)
    try:
        values = Target(plan).array("scores", output).read(box)
    except UNREADABLE:
        # The volume is reported elsewhere.
        values = np.empty(0)
    return np.histogram(values, edges)[0]


# -- outliers


def _find_outliers(reports: Sequence[VolumeReport]) -> None:
    has_objects = any(report.objects for report in reports)
    for report in reports:
        if report.is_constant:
            report.outlier_reasons.append("constant image")
        if report.objects == 0 and has_objects:
            report.outlier_reasons.append("no objects")
    for measure, high, low in _OUTLIER_MEASURES:
        measured = [report for report in reports if getattr(report, measure) is not None]
        values = np.array([getattr(report, measure) for report in measured], float)
        for report, z in zip(measured, robust_z(values), strict=True):
            if abs(z) > OUTLIER_Z:
                report.outlier_reasons.append(high if z > 0 else low)

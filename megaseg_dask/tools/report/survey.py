"""What a finished run says of each volume: objects, foreground, scores, and which volumes stand out.

The journal and the table of measurements are exact, and read first; what they
lack is looked at in the outputs, within a budget of voxels for the whole run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import sigmoid
from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import TaskError
from megaseg_dask.ngff.tables import iter_columns
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.run import workspace
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.state import OutputState, TaskSummary, VolumeState
from megaseg_dask.run.target.tables import table_location
from megaseg_dask.tools.report.sampling import (
    UNREADABLE,
    choose_view,
    spread,
    voxels_per_voxel,
    whole_or_middle,
)

Array = NDArray[Any]

# Voxels that are read of all volumes together, of the least that a glance at one takes, and of the most.
_ALL_VOXELS, _LEAST_VOXELS, _MOST_VOXELS = 2**28, 2**17, 2**24
_MOST_VOLUMES = 2**11
_READERS = 8

# Score histograms come from the finest level: averaged voxels lie nearer the middle.
_SAMPLE_SHAPE, _MOST_SAMPLES = (64, 128, 128), 64
SCORE_BINS = 51

# Eight bins for each factor of ten, up to 10^12 voxels.
SIZE_EDGES = 10 ** (np.arange(0, 12 * 8 + 1) / 8)

# Robust z-score beyond which a volume stands out (Iglewicz and Hoaglin 1993), and of how few nothing can be said.
_OUTLIER_Z, _FEWEST = 3.5, 8


@dataclass(frozen=True, slots=True)
class Run:
    """One of the runs that made a target: a plate may take several."""

    plan: Plan
    journal: Journal
    number: int = 0


@dataclass
class Facts:
    """What is known of one output of a volume; ``None`` where nobody looked, or nothing can be said.

    ``channel`` names it where there are several channels or outputs.
    """

    run: Run
    output: Output
    name: str
    image: str
    t: int
    channel: str
    objects: int | None = None
    foreground: float | None = None
    mean_score: float | None = None
    mean: float | None = None
    std: float | None = None
    threshold: float | None = None
    failures: list[str] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)

    @property
    def place(self) -> tuple[str, int, int, str]:
        """Field, timepoint of the output, channel of the source, and which of several outputs of the network."""
        volume, outputs = self.run.plan.volumes[self.output.volume], self.run.plan.model.outputs
        return (
            self.image,
            volume.target_t,
            volume.c,
            outputs[self.output.number] if len(outputs) > 1 else "",
        )

    @property
    def failed(self) -> float:
        """1 where something of it failed, else 0."""
        return float(bool(self.failures))

    @property
    def anchor(self) -> str:
        """Name of its place in the page."""
        return f"v{self.run.number}-{self.output.volume}-{self.output.number}"


@dataclass
class Survey:
    """All volumes of a target, and what they have together."""

    volumes: list[Facts]
    sizes: Array | None = None
    scores: Array | None = None
    notes: list[str] = field(default_factory=list)


def survey(runs: Sequence[Run]) -> Survey:
    """Look at the volumes of all runs on a target; what cannot be read is noted, never an error."""
    found = Survey([])
    for run in runs:
        of_run = [
            _begin(run, o)
            for volume in range(len(run.plan.volumes))
            for o in run.plan.outputs_of(volume)
        ]
        _read_journal(run, of_run)
        found.volumes += of_run
    measured = _read_table(runs[0].plan, found)
    share = len(runs)
    for run in runs:
        of_run = [f for f in found.volumes if f.run is run]
        _look(run.plan, of_run, found, share, skip_sizes=measured)
        _sample_scores(run.plan, of_run, found, share)
    found.notes = list(dict.fromkeys(found.notes))
    _find_oddities(found.volumes)
    return found


def _begin(run: Run, output: Output) -> Facts:
    plan, outputs = run.plan, run.plan.model.outputs
    v = plan.volumes[output.volume]
    channel = [_channel_name(plan, v.c)] if len(plan.suffixes) > len(outputs) else []
    channel += [outputs[output.number]] if len(outputs) > 1 else []
    parts = [v.image, f"t={v.t}" if plan.source_image.extent("t") > 1 else "", *channel]
    return Facts(
        run, output, " ".join(filter(None, parts)) or "the image", v.image, v.t, " ".join(channel)
    )


def _channel_name(plan: Plan, c: int) -> str:
    names = plan.source_image.channel_names
    return names[c] if c < len(names) else f"c={c}"


# -- the journal


def _read_journal(run: Run, volumes: Sequence[Facts]) -> None:
    plan, journal = run.plan, run.journal
    stage = plan.stage_telling("objects")
    summaries = journal.by_index(stage.name) if stage else []
    for facts in volumes if summaries else ():
        facts.objects = _of(facts.output, summaries[facts.output.volume]).n_objects
    for (name, index), failure in sorted(journal.failed.items()):
        volume, _ = plan.split_index(name, index)
        for facts in volumes[volume * len(plan.model.outputs) :][: len(plan.model.outputs)]:
            facts.failures.append(f"{name} {failure.box}: {failure.error}")
    if plan.is_one_task:
        states: Mapping[int, VolumeState | TaskSummary | None] = dict(enumerate(summaries))
    else:
        chosen = spread(len(plan.volumes), _MOST_VOLUMES)
        states = dict(zip(chosen, map_threaded(lambda v: _state(plan, v), chosen), strict=True))
    fixed = plan.options.threshold
    for facts in volumes:
        if (state := states.get(facts.output.volume)) is None:
            continue
        if state.statistics:
            # Of several channels the first.
            facts.mean = state.statistics[0].mean
            facts.std = state.statistics[0].std
        found = _of(facts.output, state).threshold
        if not isinstance(fixed, str):
            facts.threshold = fixed
        elif found is not None:
            # Found on the scale of the logits.
            facts.threshold = float(sigmoid(np.float32(found).reshape(1))[0])


def _of(output: Output, known: VolumeState | TaskSummary | None) -> OutputState:
    """Return what a summary or a state has of one output."""
    if known is None or not known.by_output:
        return OutputState()
    return known.by_output[output.number]


def _state(plan: Plan, volume: int) -> VolumeState | None:
    try:
        return workspace.read_state(plan, volume)
    except TaskError:
        return None


# -- the table


def _read_table(plan: Plan, found: Survey) -> bool:
    """Add up the rows of the table of measurements, if there is one; tell whether there is."""
    if "measurements" not in plan.options.outputs:
        return False
    voxels = {f.place: 0 for f in found.volumes}
    sizes = np.zeros(len(SIZE_EDGES) - 1, np.int64)
    columns = ("well", "field", "timepoint", "channel", "output", "volume_voxels")
    try:
        for well, name, t, c, output, n_voxels in iter_columns(table_location(plan), columns):
            sizes += np.histogram(n_voxels, SIZE_EDGES)[0]
            # Rows of one volume follow each other.
            changes = [
                np.flatnonzero(column[1:] != column[:-1]) + 1
                for column in (well, name, t, c, output)
            ]
            first = np.unique(np.concatenate([[0], *changes])) if len(t) else np.empty(0, np.intp)
            for i, total in zip(
                first, np.add.reduceat(n_voxels, first) if len(t) else (), strict=True
            ):
                image = f"{well[i]}/{name[i]}" if well[i] else ""
                voxels[image, int(t[i]), int(c[i]), output[i] or ""] += int(total)
    except (*UNREADABLE, KeyError) as error:
        found.notes.append(f"The table of measurements could not be read: {error}.")
        return False
    for facts in found.volumes:
        if facts.objects is not None:
            facts.foreground = voxels[facts.place] / Box.of(facts.run.plan.volume_shape).size
    found.sizes = sizes
    return True


# -- the voxels


def _look(
    plan: Plan, volumes: Sequence[Facts], found: Survey, share: int, *, skip_sizes: bool
) -> None:
    """Measure foreground, mean score and sizes of objects in the level that can be read of each volume."""
    chosen = spread(len(volumes), max(_MOST_VOLUMES // share, 1))
    budget = min(max(_ALL_VOXELS // share // len(chosen), _LEAST_VOXELS), _MOST_VOXELS)
    window = whole_or_middle(plan, budget)
    view = choose_view(plan, window, budget)
    sizes = np.zeros(len(SIZE_EDGES) - 1, np.int64)
    each = voxels_per_voxel(plan, view.level)

    def look(number: int) -> Array | None:
        facts = volumes[number]
        if facts.failures:
            # Where blocks are missing, zeros are nothing that was found.
            return None
        if "scores" in plan.arrays:
            scores = view.read(plan, "scores", facts.output)
            facts.mean_score = float(scores.mean(dtype=np.float64)) / _most(plan)
        if "labels" not in plan.arrays or skip_sizes:
            return None
        n_voxels = _sizes(view.read(plan, "labels", facts.output))
        facts.foreground = float(n_voxels.sum()) / view.box.size
        return np.histogram(n_voxels * each, SIZE_EDGES)[0]

    def try_look(number: int) -> Array | None:
        try:
            return look(number)
        except UNREADABLE as error:
            volumes[number].failures.append(f"report: {error}")
            return None

    for counts in map_threaded(try_look, chosen, _READERS):
        if counts is not None:
            sizes += counts
    if "labels" in plan.arrays and not skip_sizes:
        found.sizes = sizes if found.sizes is None else found.sizes + sizes
    if len(chosen) < len(volumes):
        found.notes.append(
            f"Foreground and mean scores are of {len(chosen)} of {len(volumes)} volumes."
        )
    if window != Box.of(plan.volume_shape):
        found.notes.append(
            f"Foreground, mean scores and volumes of objects are of {window}, the middle of each volume."
        )
    elif view.level:
        what = "Mean scores" if skip_sizes else "Foreground, mean scores and volumes of objects"
        found.notes.append(f"{what} are of level {view.level} of the pyramid.")


def _most(plan: Plan) -> float:
    return 255.0 if plan.options.scores_dtype == "uint8" else 1.0


def _sizes(labels: Array) -> Array:
    """Return the number of voxels of each object."""
    if int(labels.max(initial=0)) <= 2 * labels.size:
        counts = np.bincount(labels.ravel().astype(np.intp, copy=False))[1:]
        return counts[counts > 0]
    ids, counts = np.unique(labels, return_counts=True)
    return counts[ids > 0]


def _sample_scores(plan: Plan, of_run: Sequence[Facts], found: Survey, share: int) -> None:
    """Count scores of full resolution in boxes spread over volumes and over each of them."""
    good = [f.output for f in of_run if not f.failures]
    if "scores" not in plan.arrays or not good:
        return
    grid = BlockGrid(plan.volume_shape, _SAMPLE_SHAPE)
    most = max(_MOST_SAMPLES // share, 1)
    volumes = spread(len(good), most)
    boxes = spread(len(grid), max(most // len(volumes), 1))
    samples = [(good[v], grid[b]) for v in volumes for b in boxes]
    edges = np.linspace(0, 1, SCORE_BINS + 1) * _most(plan)

    def count(sample: tuple[Output, Box]) -> Array:
        try:
            values = workspace.product(plan, "scores", sample[0]).read(sample[1])
        except UNREADABLE:
            return np.zeros(
                SCORE_BINS, np.int64
            )  # the volume is named already, or will be by whoever reads it
        return np.histogram(values, edges)[0]

    before = np.zeros(SCORE_BINS, np.int64) if found.scores is None else found.scores
    found.scores = sum(map_threaded(count, samples, _READERS), before)
    if len(samples) < len(good) * len(grid):
        found.notes.append(
            f"The histogram of scores is of {len(samples)} boxes of full resolution."
        )


# -- what stands out


def _find_oddities(volumes: Sequence[Facts]) -> None:
    for facts in volumes:
        if facts.std == 0:
            facts.oddities.append("constant image")
        if facts.objects == 0 and any(f.objects for f in volumes):
            facts.oddities.append("no objects")
    for name, text in (
        ("objects", "objects"),
        ("foreground", "foreground"),
        ("mean_score", "mean score"),
    ):
        for facts, direction in _outliers(volumes, name):
            facts.oddities.append(f"{direction} {text}")


def _outliers(volumes: Sequence[Facts], name: str) -> Iterator[tuple[Facts, str]]:
    """Yield volumes that lie far from the others, and on which side."""
    known = [f for f in volumes if getattr(f, name) is not None]
    if len(known) < _FEWEST:
        return
    values = np.array([getattr(f, name) for f in known], float)
    middle = np.median(values)
    # Counts of a few objects differ by chance: a spread of nothing would make anything an outlier.
    spread_ = max(float(np.median(np.abs(values - middle))), 0.05 * abs(float(middle)), 1e-9)
    for facts, z in zip(known, 0.6745 * (values - middle) / spread_, strict=True):
        if abs(z) > _OUTLIER_Z:
            words = ("many", "few") if name == "objects" else ("high", "low")
            yield facts, words[int(z < 0)]

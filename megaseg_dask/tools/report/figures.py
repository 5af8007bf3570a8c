"""Which charts a report shows of its volumes and seams, and their texts."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from markupsafe import Markup

from megaseg_dask.plan.plan import Plan
from megaseg_dask.tools.report import charts
from megaseg_dask.tools.report.charts import Cell, Line, Mark, number
from megaseg_dask.tools.report.seams import REACH, Comparison, Profile, Seams
from megaseg_dask.tools.report.survey import N_SCORE_BINS, SIZE_EDGES, Survey, VolumeReport

# A plate with more fields has one cell per well.
_MAX_CELLS = 2500


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of volumes: its attribute, its title, and the text of a value."""

    name: str
    title: str
    text: Callable[[float], str]

    def values(self, reports: Iterable[VolumeReport]) -> list[float]:
        """Return the values of the volumes that have one."""
        values = [getattr(report, self.name) for report in reports]
        return [float(value) for value in values if value is not None]


METRICS = (
    Metric("objects", "Objects", number),
    Metric("foreground", "Foreground", lambda share: f"{share:.1%}"),
    Metric("mean_score", "Mean score", number),
)
FAILED = Metric("failed", "Failed", lambda share: f"{share:.0%}")


# -- seams


@dataclass(frozen=True, slots=True)
class SeamMeasure:
    """A measure at faces: its name in a profile, its text, its chart, and the output it is of."""

    name: str
    text: str
    title: str
    kind: str


_SEAM_MEASURES = (
    SeamMeasure("step", "score step", "Mean score step between neighbouring planes", "scores"),
    SeamMeasure("ends", "objects end", "Share of voxels where an object ends", "labels"),
)


def seam_measures(plan: Plan) -> list[SeamMeasure]:
    """Return the measures that a run's outputs allow."""
    return [measure for measure in _SEAM_MEASURES if measure.kind in plan.arrays]


def seam_rows(plan: Plan, seams: Seams) -> list[tuple[Profile, str, Comparison]]:
    """Return a row of the table per axis and measure."""
    pairs = product(seams.profiles, seam_measures(plan))
    return [(profile, measure.text, profile.compare(measure.name)) for profile, measure in pairs]


def seam_charts(plan: Plan, seams: Seams) -> list[Markup]:
    """Draw each measure at the faces and beside them, a line per axis."""
    figures = []
    distances = range(-REACH, REACH + 1)
    x = "planes from the face of two blocks"
    for measure in seam_measures(plan):
        lines = []
        for profile in seams.profiles:
            values = profile.per_pair(measure.name).tolist()
            lines.append(Line(f"along {profile.axis}", values))
        figures.append(charts.curves(distances, lines, title=measure.title, x=x, marked=0))
    return figures


# -- plates


def plate_maps(plans: Sequence[Plan], survey: Survey, featured: set[str]) -> list[Markup]:
    """Draw a map of the plate per channel and metric.

    ``featured`` are the anchors of volumes with pictures, to which their cells lead.
    """
    plates = [plan.plate for plan in plans if plan.plate]
    if not plates:
        return []
    wells: set[str] = set().union(*(plate.wells for plate in plates))
    rows = {well.split("/")[0] for well in wells}
    columns = {well.split("/")[1] for well in wells}
    missing = missing_fields(plans)
    metrics = [metric for metric in METRICS if metric.values(survey.volumes)]
    # A map of failures shows how many there are; on the others, their cells have crosses.
    if missing or any(report.run.journal.failed for report in survey.volumes):
        metrics.append(FAILED)
    maps = []
    for channel, metric in product(channels(survey), metrics):
        reports = [report for report in survey.volumes if report.channel == channel]
        figure = charts.plate_map(
            [row for row in plates[0].rows if row in rows],
            [column for column in plates[0].columns if column in columns],
            _by_well([*_cells(reports, metric, featured), *_missing_cells(missing, metric)]),
            title=f"{metric.title} {channel}".strip(),
            text=metric.text,
        )
        maps.append(figure)
    return maps


def missing_fields(plans: Sequence[Plan]) -> list[tuple[str, str]]:
    """Return wells and fields of the plate that could not be read, each with the reason."""
    missing: list[tuple[str, str]] = []
    for plan in plans:
        if plan.plate:
            missing += plan.plate.missing
    return missing


def channels(survey: Survey) -> list[str]:
    """Return the names of channels and outputs in order; one empty name if there is only one."""
    return list(dict.fromkeys(report.channel for report in survey.volumes))


def _by_well(cells: Iterable[tuple[str, Cell]]) -> dict[str, list[Cell]]:
    wells = defaultdict(list)
    for path, cell in cells:
        wells["/".join(path.split("/")[:2])].append(cell)
    return wells


def _cells(
    reports: Sequence[VolumeReport], metric: Metric, featured: set[str]
) -> Iterator[tuple[str, Cell]]:
    """Yield path and cell of each field, or of each well if there are too many fields."""
    fields = defaultdict(list)
    for report in reports:
        fields[report.image].append(report)
    if len(fields) > _MAX_CELLS:
        fields = defaultdict(list)
        for report in reports:
            fields[report.image.rpartition("/")[0]].append(report)
    for path, of_path in fields.items():
        yield path, _cell(path, of_path, metric, featured)


def _cell(path: str, reports: Sequence[VolumeReport], metric: Metric, featured: set[str]) -> Cell:
    """Return the mean of a field or well, with a link to its worst volume."""
    values = metric.values(reports)
    value = sum(values) / len(values) if values else None
    failed = any(report.failures for report in reports)
    text = "not looked at" if value is None else metric.text(value)
    worst = next((report for report in reports if report.stands_out), reports[0])
    anchor = f"p{worst.anchor}" if worst.anchor in featured else worst.anchor
    return Cell(value, f"{path}: {'failed' if failed else text}", f"#{anchor}", failed)


def _missing_cells(
    missing: Iterable[tuple[str, str]], metric: Metric
) -> Iterator[tuple[str, Cell]]:
    value = 1.0 if metric is FAILED else None
    for i, (path, reason) in enumerate(missing):
        yield path, Cell(value, f"{path}: {reason}", f"#m{i}", failed=True)


# -- time


def time_curves(survey: Survey) -> list[Markup]:
    """Draw each metric over the timepoints, a line per channel."""
    times = sorted({report.t for report in survey.volumes})
    if len(times) < 2:
        return []
    figures = []
    for metric in METRICS:
        lines = []
        for channel in channels(survey):
            reports = [report for report in survey.volumes if report.channel == channel]
            if metric.values(reports):
                lines.append(_line_over_time(reports, times, metric, channel or metric.title))
        if lines:
            title = f"{metric.title} over time"
            figures.append(charts.curves(times, lines, title=title, x="timepoint"))
    return figures


def _line_over_time(
    reports: Sequence[VolumeReport], times: Sequence[int], metric: Metric, name: str
) -> Line:
    """Return the mean over images, and the band from lowest to highest if there are several."""
    by_time = defaultdict(list)
    for report in reports:
        by_time[report.t].append(report)
    values = [metric.values(by_time[t]) for t in times]
    mean = [sum(of_t) / len(of_t) if of_t else math.nan for of_t in values]
    if max(map(len, values)) == 1:
        return Line(name, mean)
    low = [min(of_t, default=math.nan) for of_t in values]
    high = [max(of_t, default=math.nan) for of_t in values]
    return Line(name, mean, low, high)


# -- distributions


def histograms(plan: Plan, survey: Survey) -> list[Markup]:
    """Draw the distributions of object sizes and of scores."""
    figures = []
    if survey.sizes.any():
        figures.append(_size_histogram(plan, survey))
    if survey.scores.any():
        edges = np.linspace(0, 1, N_SCORE_BINS + 1).tolist()
        counts = survey.scores.tolist()
        marks = _threshold_marks(plan, survey)
        title = "Scores of voxels"
        figures.append(charts.histogram(counts, edges, title=title, x="score", marks=marks))
    return figures


def _size_histogram(plan: Plan, survey: Survey) -> Markup:
    occupied = np.flatnonzero(survey.sizes)
    # One empty bin on each side.
    first = max(int(occupied[0]) - 1, 0)
    last = int(occupied[-1]) + 2
    voxel_um3, unit = _voxel_size(plan)
    edges = (SIZE_EDGES[first : last + 1] * voxel_um3).tolist()
    counts = survey.sizes[first:last].tolist()
    smallest = plan.resolved.min_size * voxel_um3
    marks = []
    if smallest and edges[0] <= smallest <= edges[-1]:
        marks.append(Mark(smallest, f"--min-size {plan.resolved.min_size}"))
    title = "Volume of objects"
    return charts.histogram(counts, edges, title=title, x=unit, log_x=True, marks=marks)


def _voxel_size(plan: Plan) -> tuple[float, str]:
    """Return the volume of a voxel and its unit: 1 voxel where it is unknown in µm³."""
    if plan.source_image.unknown_size is not None:
        return 1.0, "voxels"
    return math.prod(plan.source_image.spacing_um), "µm³"


def _threshold_marks(plan: Plan, survey: Survey) -> list[Mark]:
    thresholds = [r.threshold for r in survey.volumes if r.threshold is not None]
    if not thresholds or not plan.resolved.has_mask():
        return []
    low = min(thresholds)
    high = max(thresholds)
    if low == high:
        return [Mark(low, f"threshold {number(low)}")]
    method = plan.resolved.options()["threshold"]
    text = f"{method}: {number(low)} to {number(high)}, median here"
    return [Mark(float(np.median(thresholds)), text)]

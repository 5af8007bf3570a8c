"""The page: which sections there are, what they show, and in which words. The template only lays it out."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.metadata import version
from itertools import chain, islice
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.events import Failure
from megaseg_dask.ngff.group import read_attributes
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run import log, workspace
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.runner import estimate_time
from megaseg_dask.run.state import Session
from megaseg_dask.run.target import publish
from megaseg_dask.tools.report import charts
from megaseg_dask.tools.report.charts import Cell, Line, Mark, number
from megaseg_dask.tools.report.command_line import commands_of
from megaseg_dask.tools.report.pictures import Thumbnail, seam_pictures, thumbnails
from megaseg_dask.tools.report.sampling import spread
from megaseg_dask.tools.report.seams import REACH, Comparison, Profile, check_seams
from megaseg_dask.tools.report.survey import SCORE_BINS, SIZE_EDGES, Facts, Run, Survey, survey

# Volumes with pictures: so many spread over the run, and so many of those that stand out.
_MOST_SAMPLES, _MOST_OUTLIERS = 12, 24
# A page with more rows than this is slow to open; those that stand out come first.
_MOST_ROWS = 3000
# Beyond so many fields a well is one cell.
_MOST_CELLS = 2500
_DRAWERS = 4

_METRICS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("objects", "Objects", number),
    ("foreground", "Foreground", lambda share: f"{share:.1%}"),
    ("mean_score", "Mean score", number),
)
# What is compared at faces: its name in a profile, in the table, above the chart; and the output it is of.
_SEAM_MEASURES = (
    ("step", "score step", "Mean score step between neighbouring planes", "scores"),
    ("ends", "objects end", "Share of voxels where an object ends", "labels"),
)


def render(plans: Sequence[Plan]) -> str:
    """Return the page of a target, as HTML; a plate may have taken several runs."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number,
        "duration": duration,
        "gb": lambda n: f"{n / 1e9:.2f}",
    }
    template = environment.from_string(
        resources.files(__package__).joinpath("page.html").read_text()
    )
    return template.render(page=Page(plans))


def duration(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


@dataclass(slots=True)
class StageRow:
    """Work of one stage: seconds are those of all workers together, bytes the most of one."""

    name: str
    n_done: int = 0
    n_tasks: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    projected_bytes: int = 0
    projected_s: float | None = None
    # Whether it is the network's, whose time is projected.
    is_predicting: bool = False


class Page:
    """What the template shows; each part is made when it is asked for."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        # Runs on one target differ in the form of their fields alone.
        self.plans, self.plan = plans, plans[0]
        self.runs = [Run(plan, Journal.read(plan), number) for number, plan in enumerate(plans)]
        self.survey: Survey = survey(self.runs)
        whole = [f for f in self.survey.volumes if not f.failures]
        self.seams = check_seams(
            [(run.plan, [f.output for f in whole if f.run is run]) for run in self.runs]
        )
        self.version = version("megaseg-dask")
        self.commands = commands_of(plans)

    # -- at a glance

    @property
    def status(self) -> str:
        """Return ``done``, ``failed`` or ``not finished``."""
        if self.failed or (self.missing and self.sessions):
            return "failed"
        return (
            "done" if all(run.journal.result is not None for run in self.runs) else "not finished"
        )

    @cached_property
    def summaries(self) -> list[dict[str, Any]]:
        """Return the summary of each plan."""
        return [plan.summary() for plan in self.plans]

    @property
    def failed(self) -> list[Failure]:
        """Return the tasks that failed last and were not mended since."""
        return [failure for run in self.runs for failure in run.journal.failed.values()]

    @property
    def sessions(self) -> list[Session]:
        """Return when clients worked on the target, as far as they recorded it."""
        return [session for run in self.runs for session in run.journal.sessions]

    @property
    def missing(self) -> tuple[tuple[str, str], ...]:
        """Return wells and fields of the plate that could not be read, each with the reason."""
        return tuple(entry for plan in self.plans if plan.plate for entry in plan.plate.missing)

    @property
    def warnings(self) -> list[str]:
        """Return what the run warned of."""
        return [
            text for run in self.runs if run.journal.result for text in run.journal.result.warnings
        ]

    @property
    def n_objects(self) -> int | None:
        """Number of objects in all volumes that are finished."""
        known = [f.objects for f in self.survey.volumes if f.objects is not None]
        return sum(known) if known else None

    @property
    def n_voxels(self) -> int:
        """Voxels of all volumes."""
        return sum(len(plan.volumes) * math.prod(plan.volume_shape) for plan in self.plans)

    @property
    def wall_s(self) -> float:
        """Seconds that clients worked on the run, as far as they recorded it."""
        return float(sum(session.wall_s for session in self.sessions))

    @property
    def n_odd(self) -> int:
        """Number of volumes that stand out or failed."""
        return sum(bool(f.oddities or f.failures) for f in self.survey.volumes)

    @property
    def absent(self) -> int:
        """Chunks of the source that are not there."""
        return sum(
            summary.absent
            for run in self.runs
            for stage in run.plan.stages
            for summary in run.journal.summaries(stage.name)
        )

    # -- seams

    @property
    def seam_rows(self) -> list[tuple[Profile, str, Comparison]]:
        """Return a row per axis and measure."""
        rows = []
        for profile in self.seams.profiles if self.seams else ():
            for name, text, _, needed in _SEAM_MEASURES:
                if needed not in self.plan.arrays:
                    continue
                rows.append((profile, text, profile.compare(name)))
        return rows

    @cached_property
    def seam_charts(self) -> list[Markup]:
        """Draw what each axis shows at the faces and beside them."""
        made, places = [], list(range(-REACH, REACH + 1))
        for name, _, title, needed in _SEAM_MEASURES:
            if self.seams and needed in self.plan.arrays:
                lines = [
                    Line(f"along {p.axis}", p.per_pair(name).tolist()) for p in self.seams.profiles
                ]
                made.append(
                    charts.curves(
                        places, lines, title=title, x="planes from the face of two blocks", marked=0
                    )
                )
        return made

    @cached_property
    def seam_pictures(self) -> list[Thumbnail]:
        """Show one face of each axis, that with most objects across."""
        faces = list(self.seams.best.values()) if self.seams else []
        return list(chain(*map_threaded(seam_pictures, faces, _DRAWERS)))

    # -- plates, times, distributions

    @property
    def channels(self) -> list[str]:
        """Return the name of each channel and output; one without a name if there is one."""
        return list(dict.fromkeys(facts.channel for facts in self.survey.volumes))

    @cached_property
    def plate_maps(self) -> list[Markup]:
        """Draw a map of the plate for each metric and channel."""
        plate = self.plan.plate
        if plate is None:
            return []
        wells = [well.split("/") for plan in self.plans if plan.plate for well in plan.plate.wells]
        rows = [name for name in plate.rows if any(row == name for row, _ in wells)]
        columns = [name for name in plate.columns if any(column == name for _, column in wells)]
        known = [
            m for m in _METRICS if any(getattr(f, m[0]) is not None for f in self.survey.volumes)
        ]
        # What failed has a map of its own; the others show where there is nothing to see.
        failed = (
            [("failed", "Failed", lambda share: f"{share:.0%}")]
            if self.failed or self.missing
            else []
        )
        return [
            charts.plate_map(
                rows,
                columns,
                self._wells(channel, name, text),
                title=f"{title} {channel}".strip(),
                text=text,
            )
            for channel in self.channels
            for name, title, text in (*known, *failed)
        ]

    def _wells(
        self, channel: str, name: str, text: Callable[[float], str]
    ) -> dict[str, list[Cell]]:
        """Return the cells of each well: one a field, or one for all where there are very many."""
        fields: dict[str, list[Facts]] = defaultdict(list)
        coarse = len({f.image for f in self.survey.volumes}) > _MOST_CELLS
        for facts in self.survey.volumes:
            if facts.channel == channel:
                fields[facts.image.rpartition("/")[0] if coarse else facts.image].append(facts)
        cells: dict[str, list[Cell]] = defaultdict(list)
        for place, of_place in fields.items():
            known = [float(v) for f in of_place if (v := getattr(f, name)) is not None]
            value = sum(known) / len(known) if known else None
            failed = any(f.failures for f in of_place)
            shown = f"{place}: {'failed' if failed else text(value) if value is not None else 'not looked at'}"
            worst = next((f for f in of_place if f.failures or f.oddities), of_place[0])
            # To its pictures, if it has some.
            href = (
                f"#p{worst.anchor}" if worst.anchor in self.featured_anchors else f"#{worst.anchor}"
            )
            cells["/".join(place.split("/")[:2])].append(Cell(value, shown, href, failed))
        for number_, (path, reason) in enumerate(self.missing):
            value = 1.0 if name == "failed" else None
            cells["/".join(path.split("/")[:2])].append(
                Cell(value, f"{path}: {reason}", f"#m{number_}", failed=True)
            )
        return cells

    @cached_property
    def time_curves(self) -> list[Markup]:
        """Draw each metric over the timepoints: mean, and least to most where there are several images."""
        times = sorted({f.t for f in self.survey.volumes})
        if len(times) < 2:
            return []
        made = []
        for name, title, _ in _METRICS:
            found = [
                self._over_time(times, channel, channel or title, name) for channel in self.channels
            ]
            if lines := list(filter(None, found)):
                made.append(charts.curves(times, lines, title=f"{title} over time", x="timepoint"))
        return made

    def _over_time(self, times: list[int], channel: str, title: str, name: str) -> Line | None:
        by_time: dict[int, list[float]] = defaultdict(list)
        for facts in self.survey.volumes:
            if facts.channel == channel and (value := getattr(facts, name)) is not None:
                by_time[facts.t].append(float(value))
        if not by_time:
            return None
        several = max(map(len, by_time.values())) > 1
        stats = {
            how: [how(by_time[t]) if by_time[t] else math.nan for t in times]
            for how in (_mean, min, max)
        }
        return Line(
            title, stats[_mean], stats[min] if several else None, stats[max] if several else None
        )

    @cached_property
    def histograms(self) -> list[Markup]:
        """Draw the distributions of sizes and scores."""
        made = []
        sizes, scores = self.survey.sizes, self.survey.scores
        if sizes is not None and sizes.any():
            first, last = np.flatnonzero(sizes)[[0, -1]]
            first, last = max(int(first) - 1, 0), int(last) + 2
            least = self.plan.options.min_size
            edges = SIZE_EDGES[first : last + 1].tolist()
            marks = (
                [Mark(least, f"--min-size {least}")]
                if least and edges[0] <= least <= edges[-1]
                else []
            )
            counts = sizes[first:last].tolist()
            made.append(
                charts.histogram(
                    counts, edges, title="Volume of objects", x="voxels", log_x=True, marks=marks
                )
            )
        if scores is not None and scores.any():
            edges, marks = np.linspace(0, 1, SCORE_BINS + 1).tolist(), self._thresholds()
            made.append(
                charts.histogram(
                    scores.tolist(), edges, title="Scores of voxels", x="score", marks=marks
                )
            )
        return made

    def _thresholds(self) -> list[Mark]:
        found = [f.threshold for f in self.survey.volumes if f.threshold is not None]
        if not found or not self.plan.has_mask:
            return []
        if min(found) == max(found):
            return [Mark(found[0], f"threshold {number(found[0])}")]
        text = f"{self.plan.options.threshold}: {number(min(found))} to {number(max(found))}, median here"
        return [Mark(float(np.median(found)), text)]

    # -- volumes

    @cached_property
    def featured(self) -> list[tuple[Facts, list[Thumbnail]]]:
        """Return volumes with their pictures: all that stand out, up to a number, and a sample of the others."""
        odd = [f for f in self.survey.volumes if f.oddities or f.failures]
        others = [f for f in self.survey.volumes if not (f.oddities or f.failures)]
        chosen = [*odd[:_MOST_OUTLIERS], *(others[i] for i in spread(len(others), _MOST_SAMPLES))]
        return list(
            zip(
                chosen,
                map_threaded(lambda f: thumbnails(f.run.plan, f.output, f.name), chosen, _DRAWERS),
                strict=True,
            )
        )

    @property
    def n_odd_without_pictures(self) -> int:
        """Number of volumes that stand out and are not shown."""
        return max(self.n_odd - _MOST_OUTLIERS, 0)

    @property
    def rows(self) -> list[Facts]:
        """Return the volumes of the table, those that stand out first if it cannot hold all."""
        volumes = self.survey.volumes
        if len(volumes) <= _MOST_ROWS:
            return volumes
        return sorted(volumes, key=lambda f: not (f.oddities or f.failures))[:_MOST_ROWS]

    @property
    def featured_anchors(self) -> set[str]:
        """Names of the places of the volumes with pictures."""
        return {facts.anchor for facts, _ in self.featured}

    # -- how it was made

    @cached_property
    def versions(self) -> Mapping[str, str]:
        """Return the versions that the first finished output names; none where nothing is finished."""
        for group in islice(workspace.groups(self.plan), _MOST_SAMPLES):
            try:
                made_by = read_attributes(group.location(self.plan)).get(publish.PROVENANCE, {})
            except Exception:  # whatever zarr says of a group that is not there
                continue
            if versions := made_by.get("versions"):
                return dict(versions)
        return {}

    @property
    def settings(self) -> Mapping[str, object]:
        """Return every option that determines the output, as it was resolved."""
        return {
            name: value
            for name, value in self.plan.options.result_options().items()
            if value is not None
        }

    @property
    def logs(self) -> list[str]:
        """Return the addresses of what the runs said."""
        return [f"{plan.run}/{key}" for plan in self.plans for key in plan.run.keys(log.FOLDER)]

    # -- timings

    @cached_property
    def stages(self) -> list[StageRow]:
        """Return a row for each stage, over all runs."""
        rows: dict[str, StageRow] = {}
        for run in self.runs:
            for stage in run.plan.stages:
                row = rows.setdefault(stage.name, StageRow(stage.name))
                timing = run.journal.timings[stage.name]
                row.n_tasks += stage.n_tasks
                row.n_done += int(run.journal.done(stage.name).sum())
                row.seconds += timing.seconds
                row.peak_bytes = max(row.peak_bytes, timing.peak_bytes)
                row.projected_bytes = max(row.projected_bytes, run.plan.projected(stage))
                row.is_predicting = "scores" in stage.declared.tells
                row.projected_s = self.estimate["projected_s"] if row.is_predicting else None
        return list(rows.values())

    @property
    def predicting_s(self) -> float:
        """Seconds of the stages that predict, of all workers together."""
        return sum(row.seconds for row in self.stages if row.is_predicting)

    @cached_property
    def estimate(self) -> dict[str, Any]:
        """Return what predicting would take one worker like this machine."""
        found = [estimate_time(plan) for plan in self.plans]
        if any(each["projected_s"] is None for each in found):
            return next(each for each in found if each["projected_s"] is None)
        return {**found[0], "projected_s": sum(each["projected_s"] for each in found)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

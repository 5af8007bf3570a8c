"""The page as values: one dataclass per section, which the template ``page.html`` lays out.

The template contains the texts, and computes nothing.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from itertools import chain, islice
from typing import Any

import jinja2
from markupsafe import Markup

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import StoreError
from megaseg_dask.events import Failure
from megaseg_dask.messages import (
    count,
    doubt_line,
    duration,
    size_text,
    stage_phrase,
    version_of,
)
from megaseg_dask.plan.command_line import command_line
from megaseg_dask.plan.plan import Output, Plan
from megaseg_dask.plan.relabelling import RESULT
from megaseg_dask.plan.settings import Settings, declared
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run import log
from megaseg_dask.run.conclude import absent_texts
from megaseg_dask.run.finished import find_loss
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.runner import estimate_time
from megaseg_dask.run.state import Session
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.provenance import provenance_at
from megaseg_dask.run.usage import count_kept, counted_usage, projected_usage
from megaseg_dask.tools.report import figures
from megaseg_dask.tools.report.charts import number
from megaseg_dask.tools.report.pictures import Thumbnail, seam_pictures, volume_pictures
from megaseg_dask.tools.report.sampling import spread
from megaseg_dask.tools.report.seams import Comparison, Profile, Seams, check_seams
from megaseg_dask.tools.report.survey import Run, Survey, VolumeReport, survey
from megaseg_dask.tools.report.table import TableHead, read_head

# Volumes with pictures: a sample of all, and outliers.
_MAX_SAMPLES = 12
_MAX_OUTLIERS = 24
# A page with more rows is slow to open.
_MAX_ROWS = 3000
_DRAWERS = 4
_DATE = "%d %B %Y, %H:%M UTC"
# What a run took, the field of its value, and how the value is written.
_USAGE: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("time of workers", "worker_s", partial(duration, exact=True)),
    ("objects written (PUT)", "n_put", "{:,}".format),
    ("objects read or looked at (GET)", "n_get", "{:,}".format),
    ("listings (LIST)", "n_list", "{:,}".format),
    ("removals (DELETE)", "n_delete", "{:,}".format),
    ("stored bytes read", "bytes_read", size_text),
    ("stored bytes written", "bytes_written", size_text),
    ("stored bytes of the result", "bytes_kept", size_text),
)
# Options that change no result, and belong to the command that repeats a run.
_REPEATED_OPTIONS = {"model", "wells", "fields", "acquisition", "memory", "endpoint", "anon"}


@dataclass(frozen=True, slots=True)
class Overview:
    """The run at a glance. ``status`` is ``done``, ``doubtful``, ``failed`` or ``not finished``.

    ``subject`` says which model segmented which image and when, ``volumes`` what the volumes are,
    and ``size`` how large one is. ``absent`` says which chunks the source lacks; ``missing`` are
    the wells and fields that could not be read, each with the reason.
    """

    status: str
    subject: str
    volumes: str
    size: str
    failed: list[Failure]
    missing: list[tuple[str, str]]
    warnings: list[str]
    doubts: list[str]
    absent: list[str]
    n_objects: int | None
    n_voxels: int
    n_outliers: int
    n_sessions: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class SeamSection:
    """The result of the seam check, a table, a chart per measure, and one face per axis."""

    result: Seams
    rows: list[tuple[Profile, str, Comparison]]
    charts: list[Markup]
    pictures: list[Thumbnail]


@dataclass(frozen=True, slots=True)
class Volumes:
    """The rows of the table, and the volumes with pictures."""

    rows: list[VolumeReport]
    featured: list[tuple[VolumeReport, list[Thumbnail]]]
    featured_anchors: set[str]
    n_outliers_without_pictures: int


@dataclass(slots=True)
class StageRow:
    """Work of one stage: seconds of all workers together, and the most bytes of one."""

    name: str
    n_done: int = 0
    n_tasks: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0
    projected_bytes: int = 0
    projected_s: float | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One thing that the run took of workers or stores, in words, projected and counted."""

    name: str
    projected: str
    counted: str


@dataclass(frozen=True, slots=True)
class Timings:
    """The stages, and what the run took; ``time_unknown`` says why there is no projection."""

    stages: list[StageRow]
    predicting_s: float
    projected_s: float | None
    patch_s: float | None
    time_unknown: str
    usage: list[UsageRow]


@dataclass(frozen=True, slots=True)
class Origin:
    """How the output was made, and the commands that make it again."""

    commands: list[str]
    settings: Mapping[str, object]
    versions: Mapping[str, str]
    certificates: list[str]
    logs: list[str]
    version: str
    date: str


@dataclass(frozen=True, slots=True)
class Page:
    """All values of the template; the plans differ only in the form of their fields.

    ``table`` is the beginning of the table of objects, if there is one.
    """

    plan: Plan
    plans: Sequence[Plan]
    summaries: list[dict[str, Any]]
    survey: Survey
    overview: Overview
    volumes: Volumes
    plate_maps: list[Markup]
    time_curves: list[Markup]
    histograms: list[Markup]
    table: TableHead | None
    seams: SeamSection | None
    timings: Timings
    origin: Origin


def render(plans: Sequence[Plan]) -> str:
    """Return the page of a target as HTML; a plate may have several plans."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "number": number,
        "duration": partial(duration, exact=True),
        "phrase": stage_phrase,
        "unbroken": _unbroken,
        "gb": lambda n_bytes: f"{n_bytes / 1e9:.2f}",
    }
    template = environment.from_string(read_template())
    return template.render(page=make_page(plans))


def read_template() -> str:
    """Return the text of the template."""
    return resources.files(__package__).joinpath("page.html").read_text()


def make_page(plans: Sequence[Plan]) -> Page:
    """Read all that the page of a target shows."""
    runs = [Run(plan, Journal.read(plan), number) for number, plan in enumerate(plans)]
    result = survey(runs)
    volumes = _volumes(result)
    return Page(
        plan=plans[0],
        plans=plans,
        summaries=[summarize(plan) for plan in plans],
        survey=result,
        overview=_overview(runs, result),
        volumes=volumes,
        plate_maps=figures.plate_maps(plans, result, volumes.featured_anchors),
        time_curves=figures.time_curves(result),
        histograms=figures.histograms(plans[0], result),
        table=read_head(plans[0]),
        seams=_seams(runs, result),
        timings=_timings(runs),
        origin=_origin(runs),
    )


def _overview(runs: Sequence[Run], result: Survey) -> Overview:
    plans = [run.plan for run in runs]
    journals = [run.journal for run in runs]
    failed = list(chain(*(journal.failed.values() for journal in journals)))
    missing = figures.missing_fields(plans)
    sessions = list(chain(*(journal.sessions for journal in journals)))
    endings = [journal.result for journal in journals if journal.result]
    lost = [text for run in runs if (text := find_loss(run.plan, run.journal))]
    status = "done" if len(endings) == len(runs) else "not finished"
    doubts = list(chain(*(ending.doubts for ending in endings)))
    if doubts and status == "done":
        status = "doubtful"
    if failed or (missing and sessions):
        status = "failed"
    if lost:
        status = "not complete any more"
    objects = [report.objects for report in result.volumes if report.objects is not None]
    return Overview(
        status=status,
        subject=_subject(plans[0], sessions),
        volumes=_volumes_text(plans),
        size=_size_text(plans),
        failed=failed,
        missing=missing,
        warnings=[*lost, *chain(*(ending.warnings for ending in endings))],
        doubts=list(map(doubt_line, doubts)),
        absent=list(chain.from_iterable(absent_texts(run.plan, run.journal) for run in runs)),
        n_objects=sum(objects) if objects else None,
        n_voxels=sum(len(plan.volumes) * math.prod(plan.volume_shape) for plan in plans),
        n_outliers=sum(report.stands_out for report in result.volumes),
        n_sessions=len(sessions),
        wall_s=float(sum(session.wall_s for session in sessions)),
    )


def _subject(plan: Plan, sessions: Sequence[Session]) -> str:
    """Return which model segmented which channel of which image, and when."""
    names = plan.source_image.channels
    channel = ""
    if len(names) > 1:
        chosen = ", ".join(names[c] for c in plan.resolved.channels)
        channel = f" (channel {chosen})"
    text = f"{plan.model.name} on {plan.source.basename}{channel}"
    if not sessions:
        return text
    ended = max(session.began + session.wall_s for session in sessions)
    return f"{text}, {datetime.fromtimestamp(ended, UTC).strftime(_DATE)}"


def _volumes_text(plans: Sequence[Plan]) -> str:
    """Return what the volumes are: fields, timepoints and channels, in words."""
    volumes = list(chain(*(plan.volumes for plan in plans)))
    n_times = len({volume.t for volume in volumes})
    n_channels = len({volume.c for volume in volumes})
    parts = []
    if plans[0].plate:
        images = {volume.image for volume in volumes}
        wells = {image.rpartition("/")[0] for image in images}
        parts = [count(len(images), "field"), f"of {count(len(wells), 'well')}"]
    if n_times > 1:
        parts.append(count(n_times, "timepoint"))
    if n_channels > 1:
        parts.append(count(n_channels, "channel"))
    return " ".join(parts) or "one image"


def _size_text(plans: Sequence[Plan]) -> str:
    """Return the size of a volume in voxels, and in µm where their size is known."""
    shapes = dict.fromkeys(plan.volume_shape for plan in plans)
    if len(shapes) > 1:
        return f"of {len(shapes)} sizes"
    [shape] = shapes
    text = " × ".join(map(str, shape)) + " voxels"
    image = plans[0].source_image
    if image.unknown_size is not None:
        return text
    sizes = [n * um for n, um in zip(shape, image.spacing_um, strict=True)]
    return f"{text}, {' × '.join(map(number, sizes))} µm"


def _seams(runs: Sequence[Run], result: Survey) -> SeamSection | None:
    plan = runs[0].plan
    complete: dict[int, list[Output]] = defaultdict(list)
    for report in result.volumes:
        if not report.failures:
            complete[report.run.number].append(report.output)
    seams = check_seams([(run.plan, complete[run.number]) for run in runs])
    if seams is None:
        return None
    faces = [profile.best for profile in seams.profiles if profile.best]
    return SeamSection(
        result=seams,
        rows=figures.seam_rows(plan, seams),
        charts=figures.seam_charts(plan, seams),
        pictures=list(chain(*map_threaded(seam_pictures, faces, _DRAWERS))),
    )


def _volumes(result: Survey) -> Volumes:
    outliers = [report for report in result.volumes if report.stands_out]
    others = [report for report in result.volumes if not report.stands_out]
    sample = [others[i] for i in spread(len(others), _MAX_SAMPLES)]
    featured = outliers[:_MAX_OUTLIERS] + sample
    draw = partial(_pictures, is_alone=len(featured) == 1)
    pictures = map_threaded(draw, featured, _DRAWERS)
    rows = result.volumes
    if len(rows) > _MAX_ROWS:
        rows = (outliers + others)[:_MAX_ROWS]
    return Volumes(
        rows=rows,
        featured=list(zip(featured, pictures, strict=True)),
        featured_anchors={report.anchor for report in featured},
        n_outliers_without_pictures=max(len(outliers) - _MAX_OUTLIERS, 0),
    )


def _pictures(report: VolumeReport, *, is_alone: bool) -> list[Thumbnail]:
    return volume_pictures(report.run.plan, report.output, report.name, is_alone=is_alone)


def _timings(runs: Sequence[Run]) -> Timings:
    estimates = [estimate_time(run.plan) for run in runs]
    unknown = [estimate["time_unknown"] for estimate in estimates if "time_unknown" in estimate]
    projected_s = None
    if not unknown:
        projected_s = sum(estimate["projected_s"] for estimate in estimates)
    rows: dict[str, StageRow] = {}
    predicting_s = 0.0
    for run in runs:
        for stage in run.plan.stages:
            row = rows.setdefault(stage.name, StageRow(stage.name))
            timing = run.journal.timings[stage.name]
            row.n_tasks += stage.n_tasks
            row.n_done += int(run.journal.done(stage.name).sum())
            row.seconds += timing.seconds
            row.peak_bytes = max(row.peak_bytes, timing.peak_bytes)
            row.device_peak_bytes = max(row.device_peak_bytes, timing.device_peak_bytes)
            row.projected_bytes = max(row.projected_bytes, run.plan.projected(stage))
            # The stage that runs the network.
            if "scores" in stage.declared.tells:
                row.projected_s = projected_s
                predicting_s += timing.seconds
    return Timings(
        stages=list(rows.values()),
        predicting_s=predicting_s,
        projected_s=projected_s,
        patch_s=estimates[0]["patch_s"],
        time_unknown=next(iter(unknown), ""),
        usage=_usage_rows(runs, [estimate["projected_s"] for estimate in estimates]),
    )


def _usage_rows(runs: Sequence[Run], projected_s: Sequence[float | None]) -> list[UsageRow]:
    """Return what all runs took together, beside what their plans project."""
    first, *others = [counted_usage(run.plan, run.journal) for run in runs]
    counted = sum(others, first)
    projections = [
        projected_usage(run.plan, seconds) for run, seconds in zip(runs, projected_s, strict=True)
    ]
    known = [projection for projection in projections if projection is not None]
    # A plan of an earlier version has no projection.
    projected = sum(known[1:], known[0]) if len(known) == len(runs) else None
    try:
        n_kept = sum(count_kept(run.plan) for run in runs)
    except StoreError:
        n_kept = None
    return [
        UsageRow(
            name,
            "–" if projected is None else _usage_text(getattr(projected, field), write),
            _usage_text(n_kept if field == "bytes_kept" else getattr(counted, field), write),
        )
        for name, field, write in _USAGE
    ]


def _usage_text(value: float | None, write: Callable[[float], str]) -> str:
    return "–" if value is None else write(value)


def _origin(runs: Sequence[Run]) -> Origin:
    plans = [run.plan for run in runs]
    certificates = chain(*(run.journal.certificates for run in runs))
    settings = plans[0].resolved.options()
    logs = []
    for plan in plans:
        logs += [f"{plan.run}/{key}" for key in plan.run.keys(log.FOLDER)]
    return Origin(
        commands=commands_of(plans),
        settings={name: value for name, value in settings.items() if value is not None},
        versions=_versions(plans[0]),
        certificates=list(dict.fromkeys(map(str, certificates))),
        logs=logs,
        version=version_of("megaseg-dask"),
        date=datetime.now(UTC).strftime(_DATE),
    )


def _unbroken(command: str) -> list[str]:
    """Return the parts of a command that no line may break: words, and options with a value."""
    parts: list[str] = []
    for word in command.split(" "):
        is_value = bool(parts) and parts[-1].startswith("--") and " " not in parts[-1]
        if is_value and not word.startswith("--"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts


def _versions(plan: Plan) -> Mapping[str, str]:
    """Return the versions that the first finished output names; none if nothing is finished."""
    for group in islice(Target(plan).iter_groups(), _MAX_SAMPLES):
        provenance = provenance_at(group.location) or {}
        if "versions" in provenance:
            return dict(provenance["versions"])
    return {}


def _relabelling(plan: Plan) -> str:
    """Return the shell command that labels the same scores in the same way."""
    return command_line(
        "relabel",
        plan.target,
        settings=plan.resolved.as_settings(plan.settings),
        options=RESULT,
        repeats_defaults=True,
    )


def commands_of(plans: Sequence[Plan]) -> list[str]:
    """Return the shell commands that give the same output.

    The command of a single plan has its fingerprint.
    """
    commands = []
    for plan in plans:
        if not plan.resolved.predicts():
            commands.append(_relabelling(plan))
            continue
        options = {n for n in Settings.model_fields if declared(n).changes_result}
        options |= _REPEATED_OPTIONS
        # The planner writes these down also where the source leaves no choice.
        for option, axis in (("time", "t"), ("channel", "c")):
            if plan.source_image.extent(axis) == 1:
                options.remove(option)
        if len(plans) > 1:
            # Each plan has another block, and all give the same voxels.
            options.remove("block")
        address = (plan.source, plan.target)
        settings = _with_channel_names(plan)
        commands.append(command_line("segment", *address, settings=settings, options=options))
    return list(dict.fromkeys(commands))


def _with_channel_names(plan: Plan) -> Settings:
    """Return the settings of a plan, its channels by name where each image has such a channel."""
    settings = plan.resolved.as_settings(plan.settings)
    chosen = {tuple(image.channel_names) for image in plan.images.values()}
    if len(chosen) != 1:
        return settings
    [names] = chosen
    of_image = plan.source_image.channels
    is_clear = all(of_image.count(name) == 1 and not name.isdecimal() for name in names)
    if not is_clear or any("," in name for name in names):
        return settings
    return settings.model_copy(update={"channel": ",".join(names)})

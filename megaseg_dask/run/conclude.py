"""How a run begins and ends: its record and empty arrays, then its metadata and its result.

The order of writes is such that a run killed at any moment finds its record
and goes on; a target without a record is not ours.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from megaseg_dask.events import Doubt, Failure, Result
from megaseg_dask.messages import count
from megaseg_dask.ngff.volume import Absent
from megaseg_dask.plan.plan import RESAMPLING, Plan
from megaseg_dask.plan.resolved import OfVolume
from megaseg_dask.run.doubts import Facts, find_doubts
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held
from megaseg_dask.run.losses import undo_losses
from megaseg_dask.run.schedule import VolumeProgress
from megaseg_dask.run.source_listing import Listing, list_reads
from megaseg_dask.run.state import Ending, TaskSummary, VolumeState
from megaseg_dask.run.status import unread_fields
from megaseg_dask.run.target import publish
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.tasks.worker import missing_box, volume_name
from megaseg_dask.run.workspace import RunFolder, Workspace

# Volumes that a warning counts for themselves.
_MAX_NAMED = 20


def begin(plan: Plan, journal: Journal, lease: Held) -> None:
    """Record the plan, then create its arrays, again and again until a task is done.

    Raises:
        StoreError: Another client took the run over, or the store failed.
    """
    target = Target(plan)
    folder = RunFolder(plan.run)
    is_new = journal.n_done == 0
    lease.require()
    if is_new:
        folder.clear()
        journal.restart()
    folder.record(plan)
    if plan.grows and not is_new:
        grow(target, journal)
    elif is_new:
        # Records of an earlier run must not come back after a power loss, and find other arrays.
        plan.run.sync()
        lease.require()
        if plan.settings.overwrite and not target.is_in_place:
            target.remove_damaged()
        target.clear()
        if plan.settings.overwrite:
            # It imports pyarrow.
            from megaseg_dask.run.target.tables import remove_tables

            remove_tables(target)
        lease.require()
        publish.create(target)
    else:
        reopen(target, journal)
    lease.require()
    Workspace(plan).create_kept()
    _sweep(target)
    publish.refresh_consolidated(target)


def reopen(target: Target, journal: Journal) -> None:
    """Unpublish a run that goes on, and take back records that do not count any more."""
    journal.discard_damaged()
    # The result of a run that was complete must not count when its outputs are unpublished.
    journal.flush()
    undo_losses(target.plan, journal)
    publish.withdraw(target)


def extend(plan: Plan, lease: Held) -> None:
    """Record the plan of a run that grows while this client works on it, and make room for more.

    Raises:
        StoreError: Another client took the run over, or the store failed.
    """
    lease.require()
    RunFolder(plan.run).record(plan)
    publish.create_more(Target(plan))
    Workspace(plan).create_kept()


def grow(target: Target, journal: Journal) -> None:
    """Let a run go on whose plan has more volumes; what is published stays published.

    Raises:
        StoreError: The store failed.
    """
    publish.create_more(target)
    journal.discard_damaged()
    journal.flush()
    if undo_losses(target.plan, journal):
        publish.withdraw(target)


def _sweep(target: Target) -> None:
    """Remove files that clients and workers left when they were killed."""
    target.sweep()
    if target.plan.resolved.measures_objects():
        from megaseg_dask.run.target.tables import sweep_tables

        sweep_tables(target)
    target.plan.run.sweep_partial()


def already_done(plan: Plan, journal: Journal) -> Result:
    """Return the result of a run that was complete before."""
    folder = RunFolder(plan.run)
    folder.restore(plan)
    # A run that was killed in its last moment left them.
    folder.remove_work()
    failures = unread_fields(plan)
    return Result(
        status="failed" if failures else "done",
        target=plan.target.url,
        n_objects=None if failures else count_objects(plan, journal),
        wall_s=0.0,
        already_done=True,
        failures=failures,
        warnings=journal.result.warnings if journal.result else [],
        doubts=journal.result.doubts if journal.result else [],
        run=plan.run.url,
    )


def conclude(
    plan: Plan,
    journal: Journal,
    lease: Held,
    started_s: float,
    *,
    listing: Listing | None = None,
    changed: Sequence[Failure] = (),
    is_published: bool = True,
    is_over: bool = True,
) -> Result:
    """Publish what there is once all tasks were tried; record the end of a run without failures.

    ``listing`` is that of what was read, from before it was; ``changed`` says what was taken back,
    since it changed meanwhile. A run that follows its source publishes before it ``is_over``.

    Raises:
        StoreError: Another client took the run over, or the store failed.
    """
    failures = [*journal.failed.values(), *changed, *unread_fields(plan)]
    states = read_states(plan, journal)
    if any(states) and is_published:
        _publish(plan, journal, lease, states)
    warnings = _warnings(plan, states, journal)
    doubts = doubts_of(plan, states)
    n_objects = None
    if not failures and is_over:
        n_objects = count_objects(plan, journal)
        source = listing or list_reads(plan, is_needed=True)
        journal.finish(Ending(n_objects, warnings, doubts, source.text))
        lease.require()
        RunFolder(plan.run).remove_work()
    return Result(
        status="failed" if failures else "done",
        target=plan.target.url,
        n_objects=n_objects,
        wall_s=round(time.monotonic() - started_s, 3),
        failures=failures,
        warnings=warnings,
        doubts=doubts,
        peak_bytes={
            name: timing.peak_bytes for name, timing in journal.timings.items() if timing.n_tasks
        },
        device_peak_bytes={
            name: timing.device_peak_bytes
            for name, timing in journal.timings.items()
            if timing.device_peak_bytes
        },
        run=plan.run.url,
    )


def _publish(
    plan: Plan, journal: Journal, lease: Held, states: Sequence[VolumeState | None]
) -> None:
    target = Target(plan)
    missing = [missing_box(plan, stage, index) for stage, index in sorted(journal.failed)]
    writers: list[Callable[[], None]] = [partial(publish.publish, target, states, missing)]
    if plan.resolved.measures_objects():
        from megaseg_dask.run.target.tables import write_tables

        writers.append(partial(write_tables, target, missing))
    if plan.grows:
        # Whoever finds a timepoint finds its rows too.
        writers.reverse()
    for write in writers:
        lease.require()
        write()
    lease.require()
    publish.refresh_consolidated(target)
    _sweep(target)


def read_states(plan: Plan, journal: Journal) -> list[VolumeState | None]:
    """Return the state of each volume; ``None`` for one that is missing as a whole."""
    if plan.is_one_task:
        states = list(map(_state_of, journal.by_index(plan.stages[0].name)))
    else:
        states = [state_of(plan, journal, volume) for volume in range(len(plan.volumes))]
    return states if plan.resolved.predicts() else _with_statistics(plan, states)


def _with_statistics(plan: Plan, states: Sequence[VolumeState | None]) -> list[VolumeState | None]:
    """Add the statistics with which the scores were predicted."""
    basis = RunFolder(plan.basis_run).read_plan()
    predicted = read_states(basis, Journal.read(basis))
    return [
        state and replace(state, statistics=before.statistics if before else ())
        for state, before in zip(states, predicted, strict=True)
    ]


def state_of(plan: Plan, journal: Journal, volume: int) -> VolumeState | None:
    """Return what a staged run knows of a volume; ``None`` if it is not measured."""
    measure = plan.stage_telling("statistics")
    if measure is not None and not journal.is_stage_complete(measure.name, volume):
        return None
    progress = VolumeProgress(Workspace(plan), journal, volume)
    state = progress.state(("statistics", "scores", "threshold", "objects"))
    return None if state.lacking else state


def _state_of(summary: TaskSummary | None) -> VolumeState | None:
    if summary is None:
        return None
    return VolumeState(statistics=summary.statistics, by_output=summary.by_output)


def _warnings(plan: Plan, states: Sequence[VolumeState | None], journal: Journal) -> list[str]:
    """Name objects that were not split; count absent chunks and smaller batches."""
    # Voxels that are far from those of the model are a doubt.
    warnings = [text for text in plan.warnings if RESAMPLING not in text]
    summaries = list(
        chain.from_iterable(
            journal.summaries(stage.name)
            for stage in plan.stages
            if {"statistics", "scores"} & set(stage.declared.tells)
        )
    )
    warnings += absent_texts(plan, journal)
    warnings += _left_whole(plan, states)
    n_repeated = sum(summary.repeated for summary in summaries)
    if n_repeated:
        warnings.append(
            f"predicted again in float32, since logits in {plan.engine.precision} were no numbers: "
            f"{count(n_repeated, 'block')}"
        )
    batches = [summary.batch for summary in summaries if summary.batch]
    if batches:
        warnings.append(
            f"a device ran out of memory: {count(len(batches), 'task')} used smaller batches (at "
            f"least {min(batches)} instead of {plan.batch}), which can change the last bits of "
            "scores; choose a smaller --batch"
        )
    return warnings


def doubts_of(plan: Plan, states: Sequence[VolumeState | None]) -> list[Doubt]:
    """Return what the volumes of a run should not be believed for."""
    resolved = plan.resolved
    is_measured = resolved.normalization == OfVolume() and resolved.roi is None
    volumes = []
    for planned, state in zip(plan.volumes, states, strict=True):
        for number, known in enumerate(state.by_output if state else ()):
            channel = state.statistics[0] if state and state.statistics else None
            of_output = [plan.model.outputs[number]] if len(plan.model.outputs) > 1 else []
            facts = Facts(
                name=" ".join([volume_name(planned), *of_output]),
                n_voxels=math.prod(plan.volume_shape),
                channel=channel,
                is_measured=is_measured,
                output=known,
                min_size=resolved.min_size,
                is_split=resolved.split_depth is not None,
                has_size=plan.known_spacing_um is not None,
            )
            volumes.append(facts)
    doubts = find_doubts(volumes)
    if plan.far_voxels is not None:
        names = list(dict.fromkeys(map(volume_name, plan.volumes)))
        doubts.append(Doubt("voxel size", plan.far_voxels, RESAMPLING, names[:10], len(names)))
    return doubts


def _left_whole(plan: Plan, states: Sequence[VolumeState | None]) -> list[str]:
    """Name the objects of each volume that were too large to be split."""
    warnings = []
    for planned, state in zip(plan.volumes, states, strict=True):
        for output in state.by_output if state else ():
            if not output.n_whole:
                continue
            ids = ", ".join(str(object_id) for object_id, *_ in output.whole)
            more = " and others" if output.n_whole > len(output.whole) else ""
            warnings.append(
                f"{volume_name(planned)}: not split, since it did not fit a worker's memory: "
                f"{count(output.n_whole, 'object')} (label {ids}{more}); start again with more "
                "--memory and --overwrite"
            )
    return warnings


def absent_texts(plan: Plan, journal: Journal) -> list[str]:
    """Return how many chunks the source lacks, in all and of the volumes; nothing if none."""
    counts: Counter[str] = Counter()
    n_inner = 0
    for stage in plan.stages:
        is_reading = {"statistics", "scores"} & set(stage.declared.tells)
        if not is_reading and stage.name != "measurements":
            continue
        for index, summary in enumerate(journal.by_index(stage.name)):
            if summary is None:
                continue
            absent = Absent(summary.absent, summary.absent_inner) + summary.absent_measured
            if absent != Absent():
                volume, _ = plan.split_index(stage.name, index)
                name = volume_name(plan.volumes[volume])
                counts[name] += absent.objects + absent.inner
                n_inner += absent.inner
    if not counts:
        return []
    inner = f", {n_inner} of them in shards" if n_inner else ""
    verb = "is" if counts.total() == 1 else "are"
    was = "was" if counts.total() == 1 else "were"
    each = [f"{name}: {n}" for name, n in counts.most_common(_MAX_NAMED)]
    if len(counts) > _MAX_NAMED:
        each.append("…")
    return [
        f"{count(counts.total(), 'chunk')} of the source {verb} missing{inner}, and {was} read as "
        f"its fill value ({', '.join(each)})"
    ]


def count_objects(plan: Plan, journal: Journal) -> int | None:
    """Return the objects in all volumes; ``None`` if no labels are written."""
    stage = plan.stage_telling("objects")
    if stage is None or not plan.resolved.writes_labels():
        return None
    outputs = chain.from_iterable(summary.by_output for summary in journal.summaries(stage.name))
    return sum(output.n_objects or 0 for output in outputs)

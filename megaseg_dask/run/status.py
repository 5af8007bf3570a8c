"""How the runs on a target are: what is done, pending and failed, from their records alone."""

from dataclasses import replace

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.events import Failure, RunStatus
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.ownership import is_present
from megaseg_dask.run.usage import count_kept, counted_usage
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location


def status(
    target: str,
    label_name: str | None = None,
    *,
    checks_outputs: bool = False,
    counts_kept: bool = False,
) -> list[RunStatus]:
    """Return the status of each run on a target, of one label name or of all.

    It is read from the records. With ``checks_outputs``, the outputs of finished runs are listed
    too, and their metadata are read. With ``counts_kept``, they are listed for their sizes.

    Raises:
        TargetError: No run is recorded there, or its record cannot be read.
        StoreError: The store failed.
    """
    plans = recorded_plans(target, label_name)
    runs = [_status_of(plan, checks_outputs=checks_outputs) for plan in plans]
    if not counts_kept:
        return runs
    return [_with_kept(run, plan) for run, plan in zip(runs, plans, strict=True)]


def _with_kept(run: RunStatus, plan: Plan) -> RunStatus:
    assert run.used is not None
    return replace(run, used=replace(run.used, bytes_kept=count_kept(plan)))


def recorded_plans(target: str, label_name: str | None = None) -> list[Plan]:
    """Return the plans of the runs on a target, of one label name or of all; at least one.

    Raises:
        TargetError: No run is recorded there, or its record cannot be read.
    """
    where = Location.of(target)
    where.probe(TargetError)
    plans = RunFolder.plans(where, label_name)
    if not plans:
        others = dict.fromkeys(plan.resolved.label_name for plan in RunFolder.plans(where))
        named = f" of the name {label_name}" if label_name else ""
        advice = "start one with megaseg segment"
        if others:
            advice = f"choose one of {', '.join(others)} with --label-name"
        raise TargetError(
            f"no run{named} is recorded at {runs_folder(where)}{where.hint()}; {advice}"
        )
    return plans


def find_plans(target: str, label_name: str | None = None) -> list[Plan]:
    """Return the recorded plans of a target, at least one; a plate may have several.

    Without a name they are those of the run that predicted, though labels were made again of it.

    Raises:
        TargetError: No run is recorded there.
        SettingsError: Several runs are, and none is named.

    """
    plans = recorded_plans(target, label_name)
    predicting = [plan for plan in plans if plan.resolved.predicts()]
    names = dict.fromkeys(plan.resolved.label_name for plan in predicting or plans)
    if len(names) == 1:
        [name] = names
        return [plan for plan in plans if plan.resolved.label_name == name]
    raise SettingsError(f"{target} has runs {', '.join(names)}; choose one with --label-name")


def _status_of(plan: Plan, *, checks_outputs: bool) -> RunStatus:
    journal = Journal.read(plan)
    lost = ""
    if checks_outputs:
        # What publishes takes long to import.
        from megaseg_dask.run.finished import find_loss

        lost = find_loss(plan, journal)
    return RunStatus(
        label_name=plan.run.basename,
        # A record beside arrays that are gone is a record of nothing.
        done=journal.result is not None and is_present(Target(plan)) and not lost,
        stages={
            stage.name: (int(journal.done(stage.name).sum()), stage.n_tasks)
            for stage in plan.stages
        },
        failures=[*journal.failed.values(), *unread_fields(plan)],
        channels=plan.channel_texts,
        fields=plan.field_paths,
        command="segment" if plan.resolved.predicts() else "relabel",
        lost=lost,
        used=counted_usage(plan, journal),
        timepoints=_timepoints_of(plan, journal) if plan.grows else None,
    )


def _timepoints_of(plan: Plan, journal: Journal) -> dict[str, int] | None:
    """Return how many timepoints of a followed source are there, and done, by a look at it."""
    # Nothing else of a status needs to read images.
    from megaseg_dask.plan.arrivals import Watcher, taken_of

    # A look alone cannot tell whether something changes.
    settings = plan.settings.model_copy(update={"follow": True, "settle": 0.0})
    try:
        arrived = Watcher(plan.source, settings, taken_of([plan])).look()
    except (OSError, ValueError):
        return None
    left = set()
    for number, volume in enumerate(plan.volumes):
        if not journal.is_complete(number):
            left.add((volume.image, volume.t))
    n_planned = sum(plan.n_times_of(path) for path in plan.images)
    return {
        "there": arrived.total_there,
        "done": n_planned - len(left),
        "announced": arrived.total_announced,
    }


def unread_fields(plan: Plan) -> list[Failure]:
    """Return what a plate lists and cannot be read: it has no task that could fail."""
    missing = plan.plate.missing if plan.plate is not None else ()
    return [
        Failure("plan", number, path, "", reason) for number, (path, reason) in enumerate(missing)
    ]

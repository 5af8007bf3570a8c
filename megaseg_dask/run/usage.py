"""What a run takes of workers and stores: as it is projected, and as it was counted."""

from collections.abc import Sequence
from dataclasses import replace

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.events import Result, Usage
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.requests import kept_bytes, project_traffic
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.stores import Location, Traffic, take_traffic


def projected_usage(plan: Plan, worker_s: float | None) -> Usage | None:
    """Return what a whole run should take, whose tasks take ``worker_s`` of one worker.

    ``None`` if the plan was recorded by a version that did not project it.
    """
    n_workers = max(plan.settings.workers or 1, 1)
    traffic = project_traffic(plan, n_workers, (worker_s or 0.0) / n_workers)
    if traffic is None:
        return None
    return _usage(plan, worker_s, traffic, kept_bytes(plan))


def counted_usage(plan: Plan, journal: Journal) -> Usage:
    """Return what all sessions of a run took so far, as far as it is recorded.

    Workers are paid for from the begin of a session to its end. A job array has no sessions: its
    tasks are added up.
    """
    held_s = sum(
        session.wall_s * max(len({worker.name for worker in session.workers}), 1)
        for session in journal.sessions
    )
    in_tasks_s = sum(timing.seconds for timing in journal.timings.values())
    return _usage(plan, max(held_s, in_tasks_s / plan.tasks_at_once), journal.traffic, None)


def count_kept(plan: Plan) -> int:
    """Return the stored bytes of the images of a run at its target, by a listing of them.

    Raises:
        StoreError: The store failed.
    """
    target = Target(plan)
    if target.is_in_place:
        places = [group.location for group in target.iter_groups()]
    else:
        places = [image.location for image in target.images]
    listings = map_threaded(Location.entries, places)
    return sum(entry.size for entries in listings for entry in entries)


def with_usage(result: Result, runs: Sequence[tuple[Plan, Journal]]) -> Result:
    """Return the result of some runs with what they took, the last requests of this client too."""
    first, *others = [counted_usage(plan, journal) for plan, journal in runs]
    total = sum(others, first)
    last = _usage(runs[0][0], 0.0, take_traffic(), None)
    return replace(result, used=total + last)


def _usage(plan: Plan, worker_s: float | None, traffic: Traffic, n_kept: int | None) -> Usage:
    device = plan.engine.device if plan.resolved.predicts() else "cpu"
    return Usage(
        worker_s=None if worker_s is None else round(worker_s, 3),
        device=device,
        n_put=traffic.n_put,
        n_get=traffic.n_get,
        n_list=traffic.n_list,
        n_delete=traffic.n_delete,
        bytes_read=traffic.bytes_read,
        bytes_written=traffic.bytes_written,
        bytes_kept=n_kept,
    )

"""``--follow``: a run goes on while its source is written.

It is a row of ordinary steps under one lease. Each plans the timepoints and fields
that are there by now, after those of the step before, so that tasks keep their numbers;
records that plan; runs what is left; and publishes it. Data are written before the arrays show
them, so what other programs find at the target is whole at every moment. The last step
plans the source as it is then: the result is that of one run on the finished source.
"""

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.events import Emit, Result, Step
from megaseg_dask.events import Following as FollowingEvent
from megaseg_dask.messages import count, duration
from megaseg_dask.plan.arrivals import Arrived, Watcher, require_followable, taken_of
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.conclude import already_done, extend
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held
from megaseg_dask.run.on_volume import VolumeCommand
from megaseg_dask.run.request import Following, Runs, configure_stores
from megaseg_dask.run.runner import (
    OpenRun,
    Session,
    join_results,
    open_session,
    record,
    with_calls,
)
from megaseg_dask.run.usage import with_usage
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location

# Between two looks: listing a bucket takes requests.
_LOOK_ON_DISK_S = 0.5
_LOOK_S = 2.0
# A look may take this share of the time.
_LOOK_SHARE = 1 / 5
_HEARTBEAT_S = 10.0
# What was there before is published in steps, each a part of what is done: publishing takes time
# in proportion to that.
_MIN_STEP = 16
_STEP_SHARE = 1 / 4
# A volume whose task failed is tried in this many steps, and once more at the end.
_MAX_TRIES = 2


def follow(
    source: str,
    target: str,
    settings: Settings,
    *,
    client: Any,
    emit: Emit,
    calls: VolumeCommand | None,
) -> Result:
    """Segment a source while it is written; resumes what an earlier run left.

    Raises:
        MegasegError: The request cannot be carried out, or was stopped.
    """
    began_s = time.monotonic()
    configure_stores(source, settings)
    require_followable(Location.of(source), Location.of(target), settings)
    emit(Step("waiting for the first timepoint"))
    known = [] if settings.overwrite else _recorded(target, settings)
    watch = _Watch(Watcher(Location.of(source), settings, taken_of(known)), settings, emit)
    watch.watcher.is_announced = any(plan.is_announced for plan in known)
    is_here = client is None
    request = Following(source, target, settings, watch.watcher, emit, is_here=is_here)
    arrived = watch.wait(taken_of(known), None)
    if arrived is None:
        raise SourceError(
            f"{source}: no timepoint appeared within {duration(settings.follow_timeout or 0)}"
            f"{watch.reason_text}"
        )
    n_taken = _take(arrived, taken_of(known))
    request.take(arrived, n_taken, is_over=False)
    plan = request.open_runs()[0][0]
    with open_session(request, plan, client, emit, calls) as (runs, session):
        request.keep_recorded()
        with ExitStack() as stack:
            steps = _Steps(request, session, watch, stack, began_s)
            result = steps.run(runs, arrived)
        result = with_calls(result, calls)
    result = with_usage(result, steps.runs)
    emit(result)
    return result


def _recorded(target: str, settings: Settings) -> list[Plan]:
    return RunFolder.plans(Location.of(target), settings.label_name, skip_damaged=True)


def _take(arrived: Arrived, taken: Mapping[str, int]) -> dict[str, int]:
    """Return how many timepoints of each field to plan next: those that are planned, and more."""
    n_left = max(_MIN_STEP, int(sum(taken.values()) * _STEP_SHARE))
    chosen = {path: taken.get(path, 0) for path in arrived.fields}
    for path, n_there in arrived.n_there.items():
        n_more = min(max(n_there - chosen[path], 0), n_left)
        chosen[path] += n_more
        n_left -= n_more
    return chosen


class _Watch:
    """Waits for a source, and says so."""

    def __init__(self, watcher: Watcher, settings: Settings, emit: Emit) -> None:
        self.watcher = watcher
        self._timeout_s = settings.follow_timeout
        self._emit = emit
        self._pause_s = _LOOK_ON_DISK_S if watcher.source.is_local else _LOOK_S
        self._changed_s = time.monotonic()
        self._n_changes = -1
        self._shown: tuple[int, int] | None = None
        self._shown_s = 0.0
        self.arrived: Arrived | None = None
        self.reason = ""

    @property
    def reason_text(self) -> str:
        """Why nothing could be taken at the last look, as the end of a sentence."""
        return f" ({self.reason})" if self.reason else ""

    def wait(self, taken: Mapping[str, int], lease: Held | None) -> Arrived | None:
        """Return what has arrived when that is more than was taken.

        It is ``None`` when nothing more is to come: the source is complete, or silent for long.
        Before the lease is held, what was taken by an earlier run is enough.

        Raises:
            SettingsError: The first look shows that the request is wrong.
            StoreError: Another client took the run over.
        """
        is_first = lease is None
        while True:
            began_s = time.monotonic()
            if lease is not None:
                lease.require()
            arrived = self._look(is_first=is_first)
            if arrived is not None:
                is_new = any(n > taken.get(path, 0) for path, n in arrived.n_there.items())
                if is_new or (is_first and any(taken.values())):
                    self._show(taken)
                    return arrived
                if self.watcher.is_over(arrived):
                    self._show(taken, is_over=True)
                    return None
            self._note_changes()
            is_silent = self._timeout_s is not None and self._waited_s >= self._timeout_s
            self._show(taken, is_over=is_silent)
            if is_silent:
                return None
            self.pause(time.monotonic() - began_s)

    def pause(self, look_s: float = 0.0) -> None:
        """Wait until the next look; the longer the last one took, the longer."""
        time.sleep(max(self._pause_s, look_s / _LOOK_SHARE))

    def restart(self) -> None:
        """Count the silence of the source from now on: while tasks ran, nobody looked."""
        self._changed_s = time.monotonic()

    def _look(self, *, is_first: bool) -> Arrived | None:
        try:
            self.arrived = self.watcher.look()
        except (OSError, ValueError) as error:
            if is_first and isinstance(error, SettingsError):
                raise
            # It may not be there yet, or be written at this moment.
            self.reason = str(error)
            return None
        self.reason = next(iter(self.arrived.missing.values()), "")
        return self.arrived

    def _note_changes(self) -> None:
        if self.watcher.n_changes != self._n_changes:
            self._n_changes = self.watcher.n_changes
            self._changed_s = time.monotonic()

    @property
    def _waited_s(self) -> float:
        return time.monotonic() - self._changed_s

    @property
    def emit(self) -> Emit:
        """Who is told."""
        return self._emit

    def _show(self, taken: Mapping[str, int], *, is_over: bool = False) -> None:
        """Tell how far the source and the run are: at once if that changed, else now and then."""
        n_there = self.arrived.total_there if self.arrived else 0
        state = (n_there, sum(taken.values()))
        now_s = time.monotonic()
        if not is_over and state == self._shown and now_s - self._shown_s < _HEARTBEAT_S:
            return
        self._shown = state
        self._shown_s = now_s
        event = FollowingEvent(
            source=self.watcher.source.url,
            n_there=n_there,
            n_done=state[1],
            n_announced=self.arrived.total_announced if self.arrived else 0,
            waited_s=round(self._waited_s, 1),
            reason=self.reason,
            is_over=is_over,
        )
        self._emit(event)


class _Steps:
    """The steps of a run that follows its source."""

    def __init__(
        self,
        request: Following,
        session: Session,
        watch: _Watch,
        stack: ExitStack,
        began_s: float,
    ) -> None:
        self._request = request
        self._session = session
        self._lease = session.lease
        self._began_s = began_s
        self._watch = watch
        self._stack = stack
        self._open: dict[Location, OpenRun] = {}
        self._journals: dict[Location, Journal] = {}
        self._plans: dict[Location, Plan] = {}
        self._tries: Counter[tuple[Location, int]] = Counter()

    @property
    def runs(self) -> Runs:
        """The plans and journals of all runs so far."""
        return [(plan, self._journals[run]) for run, plan in self._plans.items()]

    def run(self, runs: Runs, arrived: Arrived) -> Result:
        """Take step after step until the source is over; return how the run ended."""
        for plan, journal in runs:
            self._journals[plan.run] = journal
            self._plans[plan.run] = plan
        while True:
            for plan, journal in runs:
                if journal.result is None:
                    self._step(plan, journal)
            taken = taken_of([plan for plan, _ in runs])
            self._watch.restart()
            further = self._plan_next(arrived, taken)
            if further is None:
                return self._finish(taken)
            arrived, runs = further

    def _plan_next(self, arrived: Arrived, taken: Mapping[str, int]) -> tuple[Arrived, Runs] | None:
        """Wait for more than was taken, and plan it; ``None`` if nothing more is to come."""
        following = self._left_of(arrived, taken) or self._watch.wait(taken, self._lease)
        while following is not None:
            if self._can_plan(following, _take(following, taken), is_over=False):
                return following, self._record()
            self._watch.pause()
            following = self._watch.wait(taken, self._lease)
        return None

    def _can_plan(self, arrived: Arrived, n_taken: Mapping[str, int], *, is_over: bool) -> bool:
        """Plan a step; metadata that are written at this moment may be in the way."""
        try:
            self._request.take(arrived, n_taken, is_over=is_over)
        except TargetError:
            raise
        except (OSError, ValueError) as error:
            self._watch.reason = str(error)
            return False
        return True

    def _left_of(self, arrived: Arrived, taken: Mapping[str, int]) -> Arrived | None:
        """Return what had arrived if more of it is left than a step took."""
        is_left = any(n > taken.get(path, 0) for path, n in arrived.n_there.items())
        return arrived if is_left else None

    def _record(self) -> Runs:
        """Record what is planned, before anything of it is done."""
        runs = self._request.runs_of(self._journals, self._lease)
        for plan, journal in runs:
            if plan.run not in self._journals:
                record([(plan, journal)], (), self._lease, self._watch.emit)
            elif plan != self._plans[plan.run]:
                # Of a run that had ended, more is to be published.
                journal.reopen()
                extend(plan, self._lease)
            self._journals[plan.run] = journal
            self._plans[plan.run] = plan
        return runs

    def _step(self, plan: Plan, journal: Journal, *, is_over: bool = False) -> Result:
        if plan.run not in self._open:
            work = self._stack.enter_context(self._session.opened(plan, journal))
            self._open[plan.run] = work
            work.show_start(plan)
        failed = {plan.split_index(*task)[0] for task in journal.failed}
        left_out = {v for v in failed if self._tries[plan.run, v] >= _MAX_TRIES}
        self._tries.update((plan.run, volume) for volume in failed)
        if is_over:
            left_out = set()
        work = self._open[plan.run]
        return self._session.step(plan, work, is_over=is_over, left_out=left_out)

    def _finish(self, taken: Mapping[str, int]) -> Result:
        """Publish the source as it is now: metadata may have changed after the last timepoint.

        Raises:
            SourceError: It cannot be read now.
        """
        arrived = self._watch.arrived
        if arrived is None or not self._can_plan(arrived, taken, is_over=True):
            source = self._watch.watcher.source
            raise SourceError(f"{source} cannot be read any more{self._watch.reason_text}")
        runs = self._record()
        results = []
        for plan, journal in runs:
            if journal.result is not None:
                results.append(already_done(plan, journal))
                continue
            result = self._timed(self._step(plan, journal, is_over=True))
            results.append(self._open[plan.run].finish(result))
        result = self._timed(join_results(results))
        warning = _unfinished_text(arrived, taken)
        return result.with_warnings([warning]) if warning else result

    def _timed(self, result: Result) -> Result:
        """Return a result with the time since the command began, not that of the last step."""
        if result.already_done:
            return result
        return replace(result, wall_s=round(time.monotonic() - self._began_s, 3))


def _unfinished_text(arrived: Arrived, taken: Mapping[str, int]) -> str:
    """Return what the metadata list and is not there; nothing if all of it is done."""
    n_absent = arrived.total_announced - sum(taken.values())
    if not n_absent:
        return ""
    path = next(path for path, n in arrived.n_announced.items() if n > taken.get(path, 0))
    first = arrived.fields[path].choice.times[0] + taken.get(path, 0)
    return (
        f"{count(n_absent, 'timepoint')} of {arrived.total_announced} that the source lists are "
        f"absent or incomplete, the first {f'{path} t={first}'.strip()}; run the same command "
        "again to continue, or run it without --follow to segment the part that exists"
    )

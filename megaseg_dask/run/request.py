"""From a request to the runs that carry it out: one run, or several for the parts of a plate.

Planning happens once. When the lease is held, only records, journals and marks
are read again: another client may have worked on the target until then.
"""

import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.events import Emit, Notice, ignore
from megaseg_dask.messages import count
from megaseg_dask.ngff.foreign import require_folder_name
from megaseg_dask.plan.arrivals import Arrived, Watcher, followed_parts, with_new_volumes
from megaseg_dask.plan.cluster_spec import cluster_of
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.plan.planner import make_plans
from megaseg_dask.plan.plate_parts import Part, read_parts
from megaseg_dask.plan.precision import gain_by_bfloat16
from megaseg_dask.plan.relabelling import (
    can_be_basis,
    plan_relabelling,
    require_new_name,
    run_beside,
)
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.source_identity import sample_of
from megaseg_dask.run.finished import read_journal, reopen_if_lost, require_source
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.ownership import (
    find_superseded,
    is_marked,
    is_present,
    require_alike,
    require_free,
    require_grown,
    require_same,
    require_whole,
)
from megaseg_dask.run.target.publish import is_withdrawn
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location, StoreOptions, configure

# Files and connections that are open at once, about: of this process, and for each worker.
_FILES = 128
_FILES_OF_WORKER = 24

Sync = Callable[[], None]
Runs = list[tuple[Plan, Journal]]


def _nothing() -> None:
    """Nothing has to be synced before a look."""


class Request:
    """What a command asks for, and the plans that carry it out.

    :class:`Relabelling` is another one, of the same methods.
    """

    def __init__(
        self,
        source: str,
        target: str,
        settings: Settings,
        emit: Emit = ignore,
        *,
        is_here: bool = True,
    ) -> None:
        """Plan the runs of a request; writes nothing.

        ``emit`` is told of the progress of models that are fetched. With ``is_here`` the workers
        are processes of this machine, unless the settings say otherwise.

        Raises:
            SettingsError: The request is wrong, or the target is on a web server.
            SourceError: The source cannot be read.
            TargetError: The target cannot be used.
            BundleError: The model cannot be used.
        """
        _require_files(settings.workers or 1)
        self.store_options = configure_stores(source, settings)
        self._source = source
        self._settings = settings
        self._emit = emit
        self._is_here = is_here and cluster_of(settings).is_local
        self._target = Location.of(target)
        # Before all else: a store that is not there is asked only once.
        if not self._target.is_listable:
            raise SettingsError(
                f"{self._target}: a web server cannot be written to; choose a folder or a bucket "
                "as TARGET"
            )
        require_folder_name(self._target)
        self._target.probe(TargetError)
        self._recorded = self._read_recorded()
        self._parts = self._plan()

    def _read_recorded(self) -> list[Plan]:
        return RunFolder.plans(self._target, skip_damaged=True)

    def _plan(self) -> list[tuple[Plan, Part]]:
        """Plan beside the recorded runs of the same name."""
        source = Location.of(self._source)
        if any(plan.grows for plan in self._recorded_of_name) and not self._settings.overwrite:
            # Of a run that followed its source, all that the metadata have is there by now.
            arrived = Watcher(source, self._settings, {}).read()
            return self._plan_arrived(arrived, arrived.n_announced, is_over=True)
        parts = read_parts(source, self._target, self._settings, self._recorded_of_name)
        return self._make_plans(parts)

    def _make_plans(self, parts: Sequence[Part], growth: float = 1.0) -> list[tuple[Plan, Part]]:
        """Plan parts, of which there will be ``growth`` times as much."""
        planned = make_plans(self._source, self._target.url, self._settings, parts, self._emit)
        is_first = not any(part.recorded or part.others for part in parts)
        # What is quick on this machine, and what it can compute, says nothing about others.
        if is_first and self._is_here and self.chooses_precision:
            return self._with_bfloat16(planned, growth)
        return planned

    def _with_bfloat16(
        self, planned: list[tuple[Plan, Part]], growth: float
    ) -> list[tuple[Plan, Part]]:
        """Return the plans in bfloat16, if that is worth it on this machine."""
        gain = gain_by_bfloat16([plan for plan, _ in planned], growth)
        if not gain:
            return planned
        self._emit(
            Notice(
                f"bfloat16 is {gain:.1f} times as fast as float32 on this machine: the run uses "
                "it if a test on this data passes; --precision fp32 keeps float32"
            )
        )
        return [(plan.with_precision("bf16"), part) for plan, part in planned]

    @property
    def _recorded_of_name(self) -> list[Plan]:
        name = self._settings.label_name
        return [plan for plan in self._recorded if plan.resolved.label_name == name]

    def _plan_arrived(
        self,
        arrived: Arrived,
        n_taken: Mapping[str, int],
        *,
        is_over: bool,
        is_announced: bool = False,
    ) -> list[tuple[Plan, Part]]:
        """Plan some of what has arrived of a source; nothing else is missing before it is over."""
        recorded = [] if self._settings.overwrite else self._recorded_of_name
        parts = followed_parts(
            arrived,
            n_taken,
            self._target,
            self._settings.label_name,
            recorded,
            names_missing=is_over,
        )
        growth = arrived.total_announced / max(sum(n_taken.values()), 1)
        grown = []
        for plan, part in self._make_plans(parts, growth):
            more = with_new_volumes(plan, part.recorded, n_taken, is_announced=is_announced)
            grown.append((more, part))
        return grown

    @property
    def superseded(self) -> list[Plan]:
        """The recorded runs of other names whose scores these runs replace."""
        return find_superseded([plan for plan, _ in self._parts], self._recorded)

    @property
    def chooses_precision(self) -> bool:
        """Whether the settings leave the precision open."""
        return self._settings.precision in (None, "auto")

    def use_precision(self, precision: Literal["fp32", "bf16", "fp16"]) -> None:
        """Plan again in a precision that the settings leave open."""
        self._settings = self._settings.model_copy(update={"precision": precision})
        self._parts = self._plan()

    def open_runs(self) -> Runs:
        """Return the plans and what earlier runs of them finished; writes nothing.

        Raises:
            TargetError: The target holds another run, or is not ours.
        """
        return self._open_journals()

    def reopen_runs(self, lease: Held) -> Runs:
        """Return the same now that the lease is held, with journals that may be written.

        It is planned again only if other plans were recorded meanwhile.

        Raises:
            TargetError: The target holds another run, or is not ours.
        """
        recorded = self._read_recorded()
        if recorded != self._recorded:
            self._recorded = recorded
            self._parts = self._plan()
        sync = synced_by(lease, self._target)
        return self._open_journals(sync)

    def _open_journals(self, sync: Sync = _nothing) -> Runs:
        require_whole([plan for plan, _ in self._parts], self.superseded)
        replaces = self._settings.overwrite and bool(self._recorded_of_name)
        return [
            (plan, _open_journal_of(plan, part, sync, replaces=replaces))
            for plan, part in self._parts
        ]


class Following(Request):
    """A request about a source that is still written: it is planned again as more arrives."""

    def __init__(
        self,
        source: str,
        target: str,
        settings: Settings,
        watcher: Watcher,
        emit: Emit = ignore,
        *,
        is_here: bool = True,
    ) -> None:
        """Plan nothing yet; as for any request, wrong ones are refused here.

        Raises:
            SettingsError: The request is wrong, or the target is on a web server.
            TargetError: The target cannot be used.
        """
        self._watcher = watcher
        self._n_taken: Mapping[str, int] = {}
        self._arrived: Arrived | None = None
        self._is_over = False
        super().__init__(source, target, settings, emit, is_here=is_here)

    def _plan(self) -> list[tuple[Plan, Part]]:
        if self._arrived is None:
            return []
        return self._plan_arrived(
            self._arrived,
            self._n_taken,
            is_over=self._is_over,
            is_announced=self._watcher.is_announced,
        )

    def take(self, arrived: Arrived, n_taken: Mapping[str, int], *, is_over: bool) -> None:
        """Plan what has arrived, as far as it is taken: all of the run, if it ``is_over``.

        Raises:
            MegasegError: It cannot be planned.
        """
        self._arrived = arrived
        self._n_taken = n_taken
        self._is_over = is_over
        self._recorded = self._read_recorded()
        self._parts = self._plan()

    def keep_recorded(self) -> None:
        """Go on with what is recorded from now on, also if it was to be overwritten."""
        self._settings = self._settings.model_copy(update={"overwrite": False})

    def runs_of(self, journals: Mapping[Location, Journal], lease: Held) -> Runs:
        """Return the plans, with the journals that are open, grown, and those of new runs.

        Raises:
            TargetError: The source changed in another way, or something is in the way.
        """
        sync = synced_by(lease, self._target)
        runs: Runs = []
        for plan, part in self._parts:
            journal = journals.get(plan.run)
            if journal is None:
                journal = _open_journal_of(plan, part, sync)
            else:
                assert part.recorded is not None
                require_grown(plan, part.recorded)
                journal.grow(plan.stages)
            runs.append((plan, journal))
        return runs


def configure_stores(source: str, settings: Settings) -> StoreOptions:
    """Let this process open stores as settings say, and return the options for others.

    Raises:
        SettingsError: An option is wrong.
    """
    options = StoreOptions.parse(
        settings.endpoint,
        settings.anon,
        settings.storage_option or (),
        source,
        settings.retries,
    )
    configure(options)
    return options


class Relabelling:
    """A request to label again what was predicted, and the plans that carry it out."""

    def __init__(self, target: str, settings: Settings) -> None:
        """Plan the runs of a request; writes nothing, and reads no bundle.

        Raises:
            SettingsError: The request is wrong.
            TargetError: The target has no run whose scores can be labelled again.
            SourceError: Intensities are to be measured, and the source changed.
        """
        _require_files(settings.workers or 1)
        self.store_options = configure_stores(target, settings)
        self._target = Location.of(target)
        self._settings = settings
        if not self._target.is_listable:
            raise SettingsError(
                f"{self._target}: nothing can be written to a web server; copy it into a folder or "
                "a bucket first"
            )
        self._target.probe(TargetError)
        # It replaces no scores.
        self.superseded: list[Plan] = []
        self._plans = self._plan()

    def _plan(self) -> list[tuple[Plan, Plan | None]]:
        """Return the plans, each with that of an earlier attempt."""
        recorded = RunFolder.plans(self._target)
        predicted = [plan for plan in recorded if plan.resolved.predicts()]
        if not recorded and not self._target.exists():
            raise TargetError(
                f"{self._target} does not exist{self._target.hint()}; give the TARGET of a run of "
                "megaseg segment"
            )
        if not predicted:
            raise TargetError(
                f"no run is recorded at {runs_folder(self._target)}; start one with megaseg segment"
            )
        require_new_name(self._settings, {plan.resolved.label_name for plan in predicted})
        kept = [plan for plan in predicted if can_be_basis(plan)]
        earlier_attempts = {plan.run.basename: plan for plan in recorded}
        plans = []
        chosen = kept or predicted[:1]
        for earlier in chosen:
            _require_predicted(earlier)
            name = run_beside(earlier, self._settings.label_name).basename
            attempt = earlier_attempts.get(name)
            attempt = None if self._settings.overwrite else attempt
            plan = plan_relabelling(earlier, self._settings, attempt, is_only=len(chosen) == 1)
            if plan.resolved.measures_objects():
                _require_same_source(plan)
            plans.append((plan, attempt))
        return plans

    def open_runs(self) -> Runs:
        """Return the plans and what earlier attempts finished; writes nothing.

        Raises:
            TargetError: The target holds another run, is not ours, or cannot be written.
        """
        runs = [(plan, _open_journal(plan, attempt)) for plan, attempt in self._plans]
        if any(journal.result is None for _, journal in runs):
            self._target.require_writable()
        return runs

    def reopen_runs(self, lease: Held) -> Runs:
        """Return the same now that the lease is held, with journals that may be written.

        Raises:
            TargetError: The target holds another run, or is not ours.
        """
        self._plans = self._plan()
        sync = synced_by(lease, self._target)
        return [(plan, _open_journal(plan, attempt, (), sync)) for plan, attempt in self._plans]


def _require_predicted(plan: Plan) -> None:
    """Check that a run has ended, and that all that it wrote is there.

    Blocks that failed are missing in what it published, and will be missing again.

    Raises:
        TargetError: It has not, or something is lost.
    """
    is_done = Journal.read(plan).result is not None
    is_lost = is_done and read_journal(plan).result is None
    if is_lost or not is_present(Target(plan)) or is_withdrawn(Target(plan)):
        raise TargetError(
            f"{plan.target}: some outputs of run {plan.resolved.label_name} are missing; first "
            "run its megaseg segment command again"
        )


def _require_same_source(plan: Plan) -> None:
    """Check that the image whose intensities are measured is the one that was predicted.

    Raises:
        SourceError: It is another by now, or cannot be read.
    """
    first = plan.source / next(iter(plan.images))
    if sample_of(first / plan.source_image.levels[0].path) != plan.source_sample:
        raise SourceError(
            f"{plan.source} changed since it was predicted; restore it, or remove measurements "
            "from --outputs"
        )


def _require_files(n_workers: int) -> None:
    """Check that this process can open enough files, and raise its own limit where it may.

    Libraries that cannot open one more tend to wait for ever.

    Raises:
        SettingsError: The limit of the system is too low.
    """
    n_files = _FILES + n_workers * _FILES_OF_WORKER
    max_files, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max_files == resource.RLIM_INFINITY or max_files >= n_files:
        return
    if hard_limit != resource.RLIM_INFINITY and hard_limit < n_files:
        raise SettingsError(
            f"this process may open {hard_limit} files, and needs about {n_files} with "
            f"{count(n_workers, 'worker')}; raise the limit (ulimit -n {n_files}), or use fewer "
            "--workers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_files, hard_limit))


def plan_runs(source: str, target: str, settings: Settings, emit: Emit = ignore) -> Runs:
    """Return the plans of a request, and what earlier runs of them finished; writes nothing.

    There are several plans only for a plate whose fields are of several forms, or were planned at
    several times.

    Raises:
        MegasegError: The request cannot be carried out.
    """
    return Request(source, target, settings, emit).open_runs()


def synced_by(lease: Held, target: Location) -> Sync:
    """Return what a journal calls before it writes: it holds the lease, and data are durable."""

    def sync() -> None:
        lease.require()
        target.sync()

    return sync


def _open_journal_of(
    plan: Plan, part: Part, sync: Sync = _nothing, *, replaces: bool = False
) -> Journal:
    return _open_journal(plan, part.recorded, part.others, sync, replaces=replaces)


def _open_journal(
    plan: Plan,
    recorded: Plan | None,
    others: Sequence[Plan] = (),
    sync: Sync = _nothing,
    *,
    replaces: bool = False,
) -> Journal:
    """Return the journal of a run, after a look at what is at the target.

    With ``replaces`` the run overwrites a recorded one, whose metadata may be damaged.
    """
    target = Target(plan)
    if recorded is not None:
        if recorded.grows:
            require_grown(plan, recorded)
        else:
            require_same(plan, recorded)
        if is_present(target):
            journal = Journal.read(plan, sync=sync)
            if plan.fingerprint == recorded.fingerprint:
                require_source(plan, recorded, journal)
            elif journal.result is not None:
                # The metadata of a source that is followed changed: they are published again.
                journal.reopen()
            reopen_if_lost(plan, journal)
            return journal
    for other in others:
        require_alike(plan, other)
    # Arrays that do not exist hold nothing, whatever a record beside them says.
    goes_on = recorded is not None
    is_known = goes_on or (replaces and is_marked(target))
    try:
        require_free(target, is_recorded=is_known, is_joining=bool(others))
    except TargetError:
        # A plan whose record is lost is named by its target and its journal too.
        journal = Journal.read(plan, sync=sync)
        is_named = is_present(target) and journal.n_done
        if goes_on or plan.settings.overwrite or not is_named:
            raise
        return journal
    if plan.resolved.measures_objects():
        # It imports pyarrow.
        from megaseg_dask.run.target.tables import require_own_tables

        require_own_tables(target)
    return Journal.of(plan, sync=sync)

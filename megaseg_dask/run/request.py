"""From a request to the runs that carry it out: one run, or several for the parts of a plate.

Planning happens once. When the lease is held, only records, journals and marks
are read again: another client may have worked on the target until then.
"""

import resource
from collections.abc import Callable

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.events import Emit, ignore
from megaseg_dask.messages import count
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.planner import make_plans
from megaseg_dask.plan.plate_parts import Part, read_parts
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held
from megaseg_dask.run.losses import read_journal
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.ownership import (
    find_superseded,
    is_present,
    require_alike,
    require_free,
    require_same,
    require_whole,
)
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location, StoreOptions, configure

# Files and connections that are open at once, about: of this process, and for each worker.
_FILES = 128
_FILES_OF_WORKER = 24

Sync = Callable[[], None]
Runs = list[tuple[Plan, Journal]]


class Request:
    """What a command asks for, and the plans that carry it out."""

    def __init__(self, source: str, target: str, settings: Settings, emit: Emit = ignore) -> None:
        """Plan the runs of a request; writes nothing.

        ``emit`` is told of the progress of models that are fetched.

        Raises:
            SettingsError: The request is wrong, or the target is on a web server.
            SourceError: The source cannot be read.
            TargetError: The target cannot be used.
            BundleError: The model cannot be used.
        """
        _require_files(settings.workers or 1)
        self.store_options = StoreOptions.parse(
            settings.endpoint,
            settings.anon,
            settings.storage_option or (),
            source,
            settings.retries,
        )
        configure(self.store_options)
        self._source = source
        self._settings = settings
        self._emit = emit
        self._target = Location.of(target)
        # Before all else: a store that is not there is asked only once.
        if not self._target.is_listable:
            raise SettingsError(
                f"{self._target}: a web server cannot be written to; choose a folder or a bucket "
                "as TARGET"
            )
        self._target.probe(TargetError)
        self._recorded = self._read_recorded()
        self._parts = self._plan()

    def _read_recorded(self) -> list[Plan]:
        return RunFolder.plans(self._target, skip_damaged=True)

    def _plan(self) -> list[tuple[Plan, Part]]:
        """Plan beside the recorded runs of the same name."""
        source = Location.of(self._source)
        name = self._settings.label_name
        recorded = [plan for plan in self._recorded if plan.resolved.label_name == name]
        parts = read_parts(source, self._target, self._settings, recorded)
        return make_plans(self._source, self._target.url, self._settings, parts, self._emit)

    @property
    def superseded(self) -> list[Plan]:
        """The recorded runs of other names whose scores these runs replace."""
        return find_superseded([plan for plan, _ in self._parts], self._recorded)

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

    def _open_journals(self, sync: Sync = lambda: None) -> Runs:
        require_whole([plan for plan, _ in self._parts], self.superseded)
        return [(plan, _open_journal(plan, part, sync)) for plan, part in self._parts]


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


def _open_journal(plan: Plan, part: Part, sync: Sync = lambda: None) -> Journal:
    """Return the journal of a run, after a look at what is at the target."""
    target = Target(plan)
    if part.recorded is not None:
        require_same(plan, part.recorded)
        if is_present(target):
            return read_journal(plan, sync)
    for other in part.others:
        require_alike(plan, other)
    # Arrays that do not exist hold nothing, whatever a record beside them says.
    is_recorded = part.recorded is not None
    try:
        require_free(target, is_recorded=is_recorded, is_joining=bool(part.others))
    except TargetError:
        # A plan whose record is lost is named by its target and its journal too.
        journal = Journal.read(plan, sync=sync)
        if is_recorded or not is_present(target) or not journal.n_done:
            raise
        return journal
    if plan.resolved.measures_objects():
        # It imports pyarrow.
        from megaseg_dask.run.target.tables import require_own_tables

        require_own_tables(target)
    return Journal.of(plan, sync=sync)

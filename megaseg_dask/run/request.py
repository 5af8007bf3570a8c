"""From a request to the runs that carry it out: one run, or several for the parts of a plate.

Planning happens once. When the lease is held, only records, journals and marks
are read again: another client may have worked on the target until then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.events import Emit, ignore
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.planner import make_plan
from megaseg_dask.plan.plate_parts import Part, read_parts
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.lease import Held
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.ownership import (
    is_present,
    require_alike,
    require_free,
    require_same,
)
from megaseg_dask.run.target.tables import require_own_tables
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location, StoreOptions, configure

Sync = Callable[[], None]


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """The plan of an image, or of one part of a plate."""

    plan: Plan
    part: Part

    def open_journal(self, sync: Sync = lambda: None) -> Journal:
        """Return the journal of the run, after a look at what is at the target.

        Raises:
            TargetError: The target holds another run, or is not ours.
        """
        target = Target(self.plan)
        if self.part.recorded is not None:
            require_same(self.plan, self.part.recorded)
            if is_present(target):
                return Journal.read(self.plan, sync=sync)
        for other in self.part.others:
            require_alike(self.plan, other)
        # Arrays that do not exist hold nothing, whatever a record beside them says.
        require_free(target, is_joining=bool(self.part.others))
        require_own_tables(target)
        return Journal.of(self.plan, sync=sync)


@dataclass(frozen=True, slots=True)
class Request:
    """What a command asks for; ``emit`` is told of the progress of models that are fetched."""

    source: str
    target: str
    settings: Settings
    emit: Emit = ignore

    @property
    def store_options(self) -> StoreOptions:
        """How the stores of the request are opened.

        Raises:
            SettingsError: An option of the stores is wrong.
        """
        settings = self.settings
        options = settings.storage_option or ()
        return StoreOptions.parse(settings.endpoint, settings.anon, options, self.source)

    def read_recorded(self) -> list[Plan]:
        """Return the plans that are recorded at the target under the label name."""
        return RunFolder.plans(Location.of(self.target), self.settings.label_name)

    def plan(self, recorded: Sequence[Plan]) -> list[PlannedPart]:
        """Plan the runs, beside those that are ``recorded``; writes nothing.

        Raises:
            SettingsError: The request is wrong.
            TargetError: The target cannot be used.
        """
        where = Location.of(self.target)
        parts = read_parts(Location.of(self.source), where, self.settings, recorded)
        return [
            PlannedPart(make_plan(self.source, self.target, self.settings, part, self.emit), part)
            for part in parts
        ]

    def require_target(self) -> None:
        """Check that the target is on a store that answers and that lists its objects.

        Before all else: a store that is not there is asked only once.

        Raises:
            SettingsError: It is on a web server.
            TargetError: The store refuses the address.
        """
        where = Location.of(self.target)
        if not where.is_listable:
            raise SettingsError(
                f"{where}: nothing can be written to a web server; "
                "choose a folder or a bucket as TARGET"
            )
        where.probe(TargetError)


class PlannedRequest:
    """A request with its plans."""

    def __init__(self, request: Request) -> None:
        """Plan a request; writes nothing.

        Raises:
            MegasegError: It cannot be carried out.
        """
        configure(request.store_options)
        request.require_target()
        self._request = request
        self._recorded = request.read_recorded()
        self._parts = request.plan(self._recorded)

    def open_runs(self) -> list[tuple[Plan, Journal]]:
        """Return the plans and what earlier runs of them finished; writes nothing.

        Raises:
            TargetError: The target holds another run, or is not ours.
        """
        return [(part.plan, part.open_journal()) for part in self._parts]

    def reopen_runs(self, lease: Held) -> list[tuple[Plan, Journal]]:
        """Return the same once the lease is held; plan again only if other plans were recorded."""
        recorded = self._request.read_recorded()
        if recorded != self._recorded:
            self._parts = self._request.plan(recorded)
            self._recorded = recorded
        return [
            (part.plan, part.open_journal(synced_by(lease, part.plan.target)))
            for part in self._parts
        ]


def plan_runs(
    source: str, target: str, settings: Settings, emit: Emit = ignore
) -> list[tuple[Plan, Journal]]:
    """Return the plans of a request, and what earlier runs of them finished; writes nothing.

    There are several plans only for a plate whose fields are of several forms, or were planned at
    several times.

    Raises:
        MegasegError: The request cannot be carried out.
    """
    return PlannedRequest(Request(source, target, settings, emit)).open_runs()


def synced_by(lease: Held, target: Location) -> Sync:
    """Return what a journal calls before it writes: it holds the lease, and data are durable."""

    def sync() -> None:
        lease.require()
        target.sync()

    return sync

"""A finished run is believed only if all that it wrote is there, and was made of this source.

Objects that tasks wrote are compared with a listing, and metadata with what
publishing would write. What is lost is made again: the run then goes on. A
source is compared by a listing of its chunks.
"""

from collections.abc import Callable

from megaseg_dask.errors import TargetError
from megaseg_dask.messages import count
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.conclude import read_states
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.losses import find_lost_tasks
from megaseg_dask.run.source_listing import list_reads
from megaseg_dask.run.target.arrays import Target
from megaseg_dask.run.target.publish import find_lost_metadata
from megaseg_dask.run.tasks.worker import task_box, volume_name
from megaseg_dask.run.workspace import Workspace
from megaseg_dask.stores import Location


def read_journal(plan: Plan, sync: Callable[[], None] = lambda: None) -> Journal:
    """Return the journal of a run, reopened if something of the outputs is lost.

    The run then goes on, and makes again what is lost.

    Raises:
        StoreError: The store failed.
    """
    journal = Journal.read(plan, sync=sync)
    reopen_if_lost(plan, journal)
    return journal


def reopen_if_lost(plan: Plan, journal: Journal) -> None:
    """Reopen the journal of a finished run if something of the outputs is lost.

    Raises:
        StoreError: The store failed.
    """
    if find_loss(plan, journal):
        journal.reopen()


def find_loss(plan: Plan, journal: Journal) -> str:
    """Return what is lost of the outputs of a finished run, in words; empty if nothing is.

    Raises:
        StoreError: The store failed.
    """
    if journal.result is None:
        return ""
    target = Target(plan)
    tasks = find_lost_tasks(plan, journal)
    if tasks:
        stage, index = tasks[0]
        volume, _ = plan.split_index(stage, index)
        name = volume_name(plan.volumes[volume])
        of = f"{stage} {index}, {name} {task_box(plan, stage, index)}"
        return f"what {count(len(tasks), 'task')} wrote was removed or changed since ({of})"
    place = (
        find_lost_metadata(target, read_states(plan, journal))
        or Workspace(plan).find_lost_kept()
        or _find_lost_table(target)
    )
    return f"{place} was removed or changed since it was written" if place else ""


def _find_lost_table(target: Target) -> Location | None:
    if not target.plan.resolved.measures_objects():
        return None
    # It imports pyarrow.
    from megaseg_dask.run.target.tables import find_lost_table

    return find_lost_table(target)


# -- the source


def require_source(plan: Plan, recorded: Plan, journal: Journal) -> None:
    """Check that the source of a finished run is as it was when the run ended.

    One that moved, or was restored from a copy, has other times: names, sizes and samples of the
    chunks tell it from another one.

    Raises:
        TargetError: Chunks of it were written, removed or replaced since.
        StoreError: The store failed.
    """
    if journal.result is None or not journal.result.source or plan.source != recorded.source:
        return
    forms, stamps = journal.result.source.split()
    found = list_reads(plan, is_needed=True).text.split() or [forms, stamps]
    if found == [forms, stamps]:
        return
    if found[0] != forms or plan.source_sample != recorded.source_sample:
        raise TargetError(
            f"{plan.target} is finished, and chunks of {plan.source} were written or removed since "
            "(their names, sizes or contents differ); choose another target, or compute it again "
            "with --overwrite"
        )

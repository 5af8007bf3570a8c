"""An import from its begin to its end, on the journal, the lease and the workers of a run.

The record comes first, the metadata that make arrays images last: a reader never
finds half of an image, and an import that was killed finds its record and goes on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.events import Emit, Failure, Result, Started, Step, ignore
from megaseg_dask.messages import one_line
from megaseg_dask.ngff.foreign import require_folder_name
from megaseg_dask.ngff.group import find_owner, holds, remove_damaged_group, write_group
from megaseg_dask.ngff.image import image_attributes
from megaseg_dask.ngff.plate import read_plate, write_plate
from megaseg_dask.ngff.volume import Volume, is_array_of, restore_array
from megaseg_dask.plan.command_line import command_line
from megaseg_dask.plan.import_plan import ImportedImage, ImportPlan, import_folder
from megaseg_dask.plan.plan import runs_folder
from megaseg_dask.plan.settings import Settings
from megaseg_dask.plan.voxel_size import size_text
from megaseg_dask.run.journal import FOLDER, Journal
from megaseg_dask.run.lease import Held, Leases, Permit
from megaseg_dask.run.losses import find_lost
from megaseg_dask.run.progress import Dispatcher, GroupSize, Recorder, StageProgress
from megaseg_dask.run.request import synced_by
from megaseg_dask.run.retries import Retries
from megaseg_dask.run.runner import LEASE_TIMING
from megaseg_dask.run.serial import SerialDispatcher
from megaseg_dask.run.state import Ending
from megaseg_dask.run.tasks.worker import Outcome, Worker
from megaseg_dask.stores import Location, StoreOptions, clear_array_cache, configure
from megaseg_dask.tools.importing.planning import (
    ImportOptions,
    plan_import,
    require_no_negative_ids,
    with_recorded_blocks,
)
from megaseg_dask.tools.importing.work import PLAN, ImportAssignment, ImportWork

# Colors of channels in viewers.
_COLORS = ("00FF00", "FF00FF", "00FFFF", "FF0000", "0000FF", "FFFF00")


@dataclass(frozen=True, slots=True)
class Imported:
    """How an import ended, what the images are, and the command to type next."""

    result: Result
    images: str
    next_command: str


def import_files(
    files: Sequence[str],
    target: str,
    options: ImportOptions,
    settings: Settings,
    emit: Emit = ignore,
) -> "Imported":
    """Write files as OME-Zarr; resumes what an earlier import of the same files left.

    Raises:
        MegasegError: The request cannot be carried out, or was stopped.
    """
    store_options = StoreOptions.parse(
        settings.endpoint, settings.anon, settings.storage_option or (), None, settings.retries
    )
    configure(store_options)
    where = Location.of(target)
    if not where.is_listable:
        raise SettingsError(
            f"{where}: nothing can be written to a web server; choose a folder or a bucket"
        )
    require_folder_name(where)
    where.probe(TargetError)
    plan = _claim(plan_import(files, target, options, settings))
    where.require_writable()
    owner = find_owner(where)
    if owner is not None:
        raise TargetError(
            f"{where} lies in {owner}, which lists its members; choose another TARGET"
        )
    journal = _read_journal(plan)
    if journal.result is not None:
        result = Result("done", where.url, None, 0.0, already_done=True, run=plan.run.url)
        emit(result)
        return Imported(result, _images_text(plan), _next_command(plan))
    if not journal.n_done:
        emit(Step("reading the files"))
        require_no_negative_ids(plan)
    with _executing(plan, store_options, emit) as dispatcher_of:
        with Leases(runs_folder(where), LEASE_TIMING).hold() as lease:
            plan = _claim(plan)
            result = _run(plan, lease, dispatcher_of, emit)
    emit(result)
    return Imported(result, _images_text(plan), _next_command(plan))


def _images_text(plan: ImportPlan) -> str:
    """Return what the images are, in words: axes and sizes are what a person has to check."""
    image = plan.images[0].image
    extents = zip(image.axis_names, image.levels[0].shape, strict=True)
    words = [" ".join(f"{axis} {n}" for axis, n in extents), image.dtype]
    words.append(f"voxels {size_text(image.spacing_um)}")
    if image.channel_names:
        # In their order: people also name a channel by its index.
        words.append(f"channels {', '.join(map(one_line, image.channel_names))}")
    text = ", ".join(words)
    if len(plan.images) == 1:
        return text
    return f"{len(plan.images)}; {plan.images[0].path} has {text}"


def _next_command(plan: ImportPlan) -> str:
    """Return the command that shows what segmenting the first channel takes."""
    name = plan.target.url.removesuffix(".zarr").removesuffix(".ome")
    image = plan.images[0].image
    settings = plan.settings
    if image.extent("c") > 1:
        settings = settings.model_copy(update={"channel": image.channels[0]})
    return command_line(
        "plan",
        plan.target,
        f"{name}-segmented.ome.zarr",
        settings=settings,
        options=("channel", "endpoint", "storage_option"),
    )


# -- what is at the target


def _claim(plan: ImportPlan) -> ImportPlan:
    """Return the plan, with the blocks of an earlier import of the same files if there is one.

    Raises:
        TargetError: Something else is at the target, which is never replaced.
    """
    if plan.target.is_local and plan.target.path.is_file():
        raise TargetError(
            f"{plan.target} is a file; the last argument is TARGET, the OME-Zarr to write"
        )
    data = import_folder(plan.target).get(PLAN)
    is_there = plan.target.exists() and bool(plan.target.children())
    if not is_there:
        return plan
    try:
        recorded = ImportPlan.model_validate_json(data) if data else None
    except ValueError:
        recorded = None
    if recorded is None:
        raise TargetError(
            f"{plan.target} exists, and {runs_folder(plan.target)} has no record of its import. "
            "An import does not replace existing files: choose another TARGET, or remove it to "
            "import again"
        )
    if recorded.fingerprint != plan.fingerprint:
        raise TargetError(
            f"{plan.target} was imported {_difference(plan, recorded)}; choose another TARGET, or "
            f"remove it and {runs_folder(plan.target)} to import again"
        )
    return with_recorded_blocks(plan, recorded)


def _difference(plan: ImportPlan, recorded: ImportPlan) -> str:
    """Return how an earlier import differs, as the end of a sentence."""
    if [file.path for file in plan.files] != [file.path for file in recorded.files]:
        return "from other files"
    for ours, theirs in zip(plan.files, recorded.files, strict=True):
        if (ours.n_bytes, ours.digest) != (theirs.n_bytes, theirs.digest):
            return f"before {ours.path} changed"
    return "with other options"


def _require_unchanged(plan: ImportPlan, journal: Journal) -> None:
    """Require that no file changed of which some planes are copied.

    Raises:
        TargetError: One did: the planes of an image would be those of two files.
    """
    recorded = plan.run.get(PLAN)
    if recorded is None:
        return
    known = ImportPlan.model_validate_json(recorded)
    copied = plan.stages[0].name
    begun: set[int] = set()
    for index in journal.done(copied).nonzero()[0].tolist():
        begun.update(part.file for part in plan.task(copied, index).image.parts)
    for number in sorted(begun):
        ours = plan.files[number]
        if ours.modified_ns != known.files[number].modified_ns:
            raise TargetError(
                f"{ours.path} was changed during its import; remove {plan.target} and "
                f"{runs_folder(plan.target)} to import it from the start"
            )


def _read_journal(plan: ImportPlan, sync: Callable[[], None] = lambda: None) -> Journal:
    """Return the journal, without the tasks whose objects are gone, short or replaced."""
    journal = Journal(plan.run, plan.fingerprint, plan.stages, sync=sync)
    if not plan.target.exists():
        # Arrays that do not exist hold nothing, whatever a record beside them says.
        return journal
    journal = journal.replayed()
    images = [plan.target / each.path for each in plan.images]
    for stage, index in find_lost(plan, journal, images):
        journal.replay({"lose": stage, "index": index})
    if journal.result is not None and not _has_metadata(plan):
        journal.replay({"reopened": True})
    return journal


def _has_metadata(plan: ImportPlan) -> bool:
    """Return whether the metadata of a finished import are there as they were written."""

    def is_whole(each: ImportedImage) -> bool:
        where = plan.target / each.path
        for number, level in enumerate(each.image.levels):
            layout = each.layout(number)
            if not is_array_of(where / level.path, each.image, number, each.image.dtype, layout):
                return False
        return holds(where, image_attributes(each.image))

    try:
        if plan.plate is not None:
            listed = {field.path for field in read_plate(plan.target).fields}
            if not listed.issuperset(each.path for each in plan.images):
                return False
        return all(map_threaded(is_whole, plan.images))
    except (SourceError, TargetError):
        # They are damaged.
        return False


# -- the work


@contextmanager
def _executing(
    plan: ImportPlan, options: StoreOptions, emit: Emit
) -> Iterator[Callable[[ImportPlan, Held], Dispatcher]]:
    """Yield what makes a dispatcher: on workers, or in this process."""
    if plan.settings.workers == 0:
        with ExitStack() as stack:

            def serial(plan: ImportPlan, lease: Held) -> Dispatcher:
                permit = Permit(Leases(runs_folder(plan.target)), lease.id)
                work = ImportWork(plan, permit)
                stack.callback(work.close)
                return SerialDispatcher(Worker(work), Retries(plan.settings.retries))

            yield serial
        return
    from megaseg_dask.run.dispatcher import open_workers

    with open_workers(plan, None, emit) as executor, executor.ready_without_model(options):

        def on_workers(plan: ImportPlan, lease: Held) -> Dispatcher:
            assignment = ImportAssignment(plan.run, plan.fingerprint, lease.id)
            return executor.dispatcher_of(assignment, plan.settings, emit)

        yield on_workers


def _run(
    plan: ImportPlan,
    lease: Held,
    dispatcher_of: Callable[[ImportPlan, Held], Dispatcher],
    emit: Emit,
) -> Result:
    started_s = time.monotonic()
    sync = synced_by(lease, plan.target)
    journal = _read_journal(plan, sync)
    if journal.n_done:
        _require_unchanged(plan, journal)
    else:
        (plan.run / FOLDER).remove()
        journal = Journal(plan.run, plan.fingerprint, plan.stages, sync=sync)
    plan.run.put(PLAN, plan.model_dump_json(indent=1).encode(), durable=True)
    lease.require()
    # Arrays of an earlier import may have been replaced by others at the same place.
    clear_array_cache()
    _create_arrays(plan)
    plan.target.sweep_partial()
    plan.run.sweep_partial()
    n_tasks = sum(stage.n_tasks for stage in plan.stages)
    emit(Started(plan.target.url, n_tasks, journal.n_done))
    recorder = Recorder(
        (plan.target,),
        journal,
        lease,
        emit,
        partial(_begin_stage, plan, journal),
        partial(_failure_of, plan),
    )
    with journal.flushed(), journal.session():
        recorder.run(dispatcher_of(plan, lease), _Tasks(plan, journal))
        failures = list(journal.failed.values())
        lease.require()
        if not recorder.store_is_lost:
            _publish(plan, journal)
        if not failures:
            journal.finish(Ending())
    return Result(
        status="failed" if failures else "done",
        target=plan.target.url,
        n_objects=None,
        wall_s=round(time.monotonic() - started_s, 3),
        failures=failures,
        peak_bytes={
            name: timing.peak_bytes for name, timing in journal.timings.items() if timing.n_tasks
        },
        run=plan.run.url,
    )


def _create_arrays(plan: ImportPlan) -> None:
    def create(each: ImportedImage) -> None:
        for number, level in enumerate(each.image.levels):
            array = plan.target / each.path / level.path
            restore_array(array, each.image, number, each.image.dtype, each.layout(number))

    map_threaded(create, plan.images)


def _begin_stage(plan: ImportPlan, journal: Journal, name: str) -> StageProgress:
    stage = next(each for each in plan.stages if each.name == name)
    voxels = 0.0
    for index in range(0, stage.n_tasks, max(stage.n_tasks // 16, 1)):
        # Tasks are nearly alike.
        voxels = max(voxels, plan.task(name, index).box.size)
    n_done = int(journal.done(name).sum())
    return StageProgress(name, n_done, stage.n_tasks, voxels, "blocks", 1.0)


def _failure_of(plan: ImportPlan, stage: str, outcome: Outcome) -> Failure:
    task = plan.task(stage, outcome.index)
    return Failure(stage, outcome.index, str(task), str(task.box), outcome.error, outcome.details)


class _Tasks:
    """The tasks that are left, level by level; images in which a task failed go no further."""

    def __init__(self, plan: ImportPlan, journal: Journal) -> None:
        self._plan = plan
        self._journal = journal
        self._waiting = iter(plan.stages)
        self._stage = ""
        self._pending: list[int] = []
        self._n_running = 0

    def take(self, size: GroupSize) -> tuple[str, Sequence[int]]:
        """Return tasks of one level."""
        while not self._pending and not self._n_running:
            stage = next(self._waiting, None)
            if stage is None:
                return "", ()
            self._stage = stage.name
            left = (~self._journal.done(stage.name)).nonzero()[0].tolist()
            failed = _failed_images(self._plan, self._journal, below=stage.level)
            # The last comes first out.
            self._pending = [
                index
                for index in reversed(left)
                if self._plan.task(stage.name, index).image.path not in failed
            ]
        n_taken = min(size(self._stage, len(self._pending)), len(self._pending))
        taken = [self._pending.pop() for _ in range(n_taken)]
        self._n_running += n_taken
        return self._stage, taken

    def settle(self, stage: str, index: int) -> None:
        """Mark a running task as ended."""
        self._n_running -= 1


def _failed_images(plan: ImportPlan, journal: Journal, *, below: int | None = None) -> set[str]:
    """Return the paths of images in which a task failed, of any level or of those below one."""
    tasks = [plan.task(stage, index) for stage, index in journal.failed]
    return {task.image.path for task in tasks if below is None or task.level < below}


# -- the end


def _publish(plan: ImportPlan, journal: Journal) -> None:
    """Write the metadata of the images that are complete, and of the plate of these."""
    failed = _failed_images(plan, journal)
    complete = [each for each in plan.images if each.path not in failed]

    def publish(each: ImportedImage) -> None:
        where = plan.target / each.path
        remove_damaged_group(where, each.image.version)
        write_group(where, each.image.version, _attributes(where, each))

    map_threaded(publish, complete)
    if plan.plate is not None and complete:
        paths = {each.path for each in complete}
        fields = tuple(field for field in plan.plate.fields if field.path in paths)
        below = [plan.target / name for field in fields for name in (field.row, field.well)]
        for node in dict.fromkeys([plan.target, *below]):
            remove_damaged_group(node, plan.plate.version)
        write_plate(plan.target, replace(plan.plate, fields=fields), plan.plate.version)


def _attributes(where: Location, each: ImportedImage) -> dict[str, Any]:
    attributes = image_attributes(each.image)
    ome = attributes.get("ome", attributes)
    if each.image.kind == "label image":
        return attributes
    ome["omero"] = {"channels": [_channel(where, each, c) for c in range(each.image.extent("c"))]}
    return attributes


def _channel(where: Location, each: ImportedImage, c: int) -> dict[str, Any]:
    """Return how viewers show a channel; its window is that of the coarsest level."""
    image = each.image
    last = len(image.levels) - 1
    values = Volume.of(where, image, level=last, c=c).read(Box.of(image.volume_shape(last)))
    low = float(np.nanmin(values))
    high = float(np.nanmax(values))
    window = {"start": low, "end": high, "min": low, "max": high}
    dtype = np.dtype(image.dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        window |= {"min": float(limits.min), "max": float(limits.max)}
    color = "FFFFFF" if image.extent("c") == 1 else _COLORS[c % len(_COLORS)]
    return {"label": image.channels[c], "color": color, "active": True, "window": window}

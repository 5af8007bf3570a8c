"""Predict what somebody looks at, in the order of looking, and record it as tasks of a run.

What is waited for is predicted at once. With a target, the blocks that were looked at
are then tasks of a run there: one thread carries them out while nothing is waited for,
under the lease of a client and with its journal. ``segment`` with the same options
computes the rest.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import max_score
from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import DataError, EngineError, MegasegError, SettingsError
from megaseg_dask.events import Emit, Event, Failure, Progress, ignore
from megaseg_dask.inference.block import Engine
from megaseg_dask.inference.certificate import Certificate
from megaseg_dask.inference.engine import replaced_engine
from megaseg_dask.inference.remembering import PatchMemory, Remembering, Turns
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.plan.planner import require_machine
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.lease import Held, Leases
from megaseg_dask.run.looked_at import Known, LookedAt
from megaseg_dask.run.request import Request
from megaseg_dask.run.runner import LEASE_TIMING, record
from megaseg_dask.run.tasks.proof import prove_engine

# Logits of patches that are kept in memory.
MEMORY_BYTES = 2**30
# So long the engine waits for the first box that is looked at, before it proves itself.
_FIRST_S = 20.0


@dataclass
class _Work:
    """What is to be done while nothing is waited for; the newest first."""

    volumes: dict[tuple[int, int], None]
    tasks: dict[tuple[int, int], None]


class Looking:
    """A request of which is predicted what is looked at.

    ``changed`` is called when provisional statistics have become exact.
    """

    def __init__(
        self,
        source: str,
        target: str | None,
        settings: Settings,
        emit: Emit = ignore,
        *,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        """Plan the request; writes nothing.

        Raises:
            MegasegError: The request cannot be carried out.
        """
        self._stack = ExitStack()
        self.has_target = target is not None
        if target is None:
            folder = TemporaryDirectory(prefix="megaseg-view-")
            self._stack.callback(folder.cleanup)
            target = str(Path(folder.name) / "predicted.zarr")
        try:
            self._request = Request(source, target, settings, emit)
            self._opened = self._request.open_runs()
            if self.has_target:
                require_machine(self._opened[0][0])
        except BaseException:
            self._stack.close()
            raise
        self._memory = PatchMemory(memory_bytes)
        self._turns = Turns()
        self._engine: Remembering | None = None
        self._is_ready = threading.Event()
        self._is_over = threading.Event()
        self._is_seen = threading.Event()
        self._awake = threading.Condition()
        self._work = _Work({}, {})
        self._lease: Held | None = None
        self._thread = threading.Thread(target=self._run, name="looking", daemon=True)
        # Of what the intensities of volumes are known that are not measured yet.
        self._provisional: dict[tuple[int, int], str] = {}
        self._share = ""
        self._is_proven = True
        # What went wrong for good, and with what was looked at last.
        self.problem = ""
        self.trouble = ""
        self.changed: Callable[[], None] = lambda: None
        self.runs = self._looked_at()

    def _looked_at(self) -> list[LookedAt]:
        runs = self._opened
        return [LookedAt(plan, journal, self._lease, self._memory) for plan, journal in runs]

    @property
    def is_finished(self) -> bool:
        """Whether the run at the target was finished before: nothing is left to record."""
        return all(journal.result is not None for _, journal in self._opened)

    @property
    def n_recorded(self) -> int:
        """How many tasks are recorded at the target."""
        return sum(journal.n_done for _, journal in self._opened)

    @property
    def plan(self) -> Plan:
        """The first plan: model and engine are the same in all."""
        return self._opened[0][0]

    def max_score(self) -> float:
        """Return the stored value of the score 1."""
        return max_score(self.plan.resolved.scores_dtype)

    # -- from beginning to end

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the target, and work in a thread; the model is opened there.

        Raises:
            TargetError: Another client works on the target; it is named.
        """
        with self._stack:
            if self.has_target and not self.is_finished:
                folder = runs_folder(self.plan.target)
                self._lease = self._stack.enter_context(Leases(folder, LEASE_TIMING).hold())
                self._opened = self._request.reopen_runs(self._lease)
                self.runs = self._looked_at()
            self._thread.start()
            try:
                yield
            finally:
                self.stop()
                self._thread.join()

    def stop(self) -> None:
        """Predict nothing more: what is under way ends at its next forward pass."""
        self._is_over.set()
        self._is_seen.set()
        self._turns.end()
        with self._awake:
            self._awake.notify_all()

    def _run(self) -> None:
        """Open the engine, then do what is to be done, until the end."""
        try:
            if not self._run_engine():
                self._use_float32()
                self._run_engine()
        except KeyboardInterrupt:
            # The end came while a task was computed; nothing is recorded of it.
            pass
        except MegasegError as error:
            self.problem = str(error)
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._engine = None
            self._is_ready.set()
            self.changed()

    def _run_engine(self) -> bool:
        """Predict until the end; return false at once if it has to be in another precision.

        Raises:
            SettingsError: The engine may not be used.
        """
        with replaced_engine(self.plan.model, self.plan.engine, self._remembering) as engine:
            # To prove itself takes longer than to predict what is seen.
            self._is_proven = self.plan.engine.is_reference
            self._engine = engine
            self._is_ready.set()
            self._is_seen.wait(_FIRST_S)
            if self._is_over.is_set():
                return True
            certificate = prove_engine(self.plan)
            if certificate is not None and not certificate.holds:
                is_recorded = any(journal.n_done for _, journal in self._opened)
                is_open = self._request.chooses_precision and not is_recorded
                if certificate.precision != "fp32" and is_open:
                    return False
                raise SettingsError(certificate.refusal)
            self._is_proven = True
            self._work_recorded(certificate)
            # What is looked at is predicted also where nothing can be recorded any more.
            self._is_over.wait()
        return True

    def _use_float32(self) -> None:
        """Plan again, in the precision that every engine offers."""
        self._engine = None
        self._is_ready.clear()
        self._request.use_precision("fp32")
        if self._lease is None:
            self._opened = self._request.open_runs()
        else:
            self._opened = self._request.reopen_runs(self._lease)
        self._memory.clear()
        self.runs = self._looked_at()
        self.changed()

    def _remembering(self, engine: Engine) -> Remembering:
        return Remembering(engine, self._memory, self._turns)

    def _work_recorded(self, certificate: Certificate | None) -> None:
        """Do what is to be done, and flush all journals at the end."""
        try:
            if self._lease is not None:
                record(self._opened, self._request.superseded, self._lease, self._note)
            with ExitStack() as stack:
                unfinished = [journal for _, journal in self._opened if journal.result is None]
                for journal in unfinished if self._lease is not None else ():
                    stack.enter_context(journal.flushed())
                    stack.enter_context(journal.session())
                    journal.certify(certificate)
                self._work_on()
        except MegasegError as error:
            self.problem = str(error)

    def _note(self, event: Event) -> None:
        if isinstance(event, Failure):
            self.problem = f"{event.volume} {event.box}: {event.error}"
        elif isinstance(event, Progress) and event.stage == "measure":
            self._share = f" ({event.n_done} of {event.n_tasks} parts)"

    # -- what is waited for

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Let the work of the thread wait meanwhile."""
        with self._turns.urgent():
            yield

    def require_ready(self) -> None:
        """Wait until the model is open.

        Raises:
            EngineError: It cannot be opened, or the work is over.
        """
        self._is_ready.wait()
        if self._engine is None or self._is_over.is_set():
            raise EngineError(self.problem or "the viewer has ended")

    def statistics(self, number: int, volume: int) -> Known:
        """Return what is known of a volume of a run, provisional if to measure it takes long.

        Raises:
            MegasegError: It cannot be read, or a voxel is not finite.
        """
        run = self.runs[number]
        known = run.known(volume) or run.recorded(volume)
        if known is None and (run.plan.measure_level is None or run.is_quick_to_measure):
            known = run.measure(volume, self._is_over)
        elif known is None:
            known = run.estimate(volume)
            run.learn(volume, known)
            self._provisional[number, volume] = known.origin
            self._add(self._work.volumes, (number, volume))
        run.learn(volume, known)
        return known

    def predict(self, number: int, volume: int, core: Box, known: Known) -> NDArray[Any]:
        """Return the scores of a box of the target.

        Raises:
            MegasegError: It cannot be predicted.
        """
        self.require_ready()
        assert self._engine is not None
        return self.runs[number].predict(volume, core, known, self._engine)

    def note(self, number: int, volume: int, core: Box) -> None:
        """Take over that somebody looked at a box of the target: its tasks are to be done."""
        self._is_seen.set()
        run = self.runs[number]
        if run.lease is not None:
            for index in run.tasks_at(volume, core):
                self._add(self._work.tasks, (number, index))

    @property
    def is_problem(self) -> bool:
        """Whether the status tells of something that went wrong."""
        return bool(self.problem or self.trouble)

    @property
    def status(self) -> str:
        """What a person should know of what is seen; empty if nothing."""
        if self.is_problem:
            return self.problem or self.trouble
        if not self._is_ready.is_set():
            return "Opening the model."
        if not self._is_proven:
            engine = self.plan.engine
            return (
                f"Provisional scores: {engine.engine} in {engine.precision} is being compared with "
                "float32 PyTorch."
            )
        origins = list(self._provisional.values())
        if not origins:
            return ""
        return (
            f"Provisional scores: intensities are normalized by {origins[-1]} until the whole "
            f"volume is measured{self._share}."
        )

    # -- what is done while nothing is waited for

    def _add(self, work: dict[tuple[int, int], None], item: tuple[int, int]) -> None:
        with self._awake:
            # What was looked at last comes first.
            work.pop(item, None)
            work[item] = None
            self._awake.notify_all()

    def _work_on(self) -> None:
        while True:
            with self._awake:
                self._awake.wait_for(self._has_work)
                if self._is_over.is_set():
                    return
                work = self._work.volumes or self._work.tasks
                is_volume = work is self._work.volumes
                number, index = work.popitem()[0]
            if is_volume:
                self._measure(number, index)
            else:
                run = self.runs[number]
                run.run_looked_at(index, self._note, self._is_over, partial(self._learn, number))

    def _has_work(self) -> bool:
        return bool(self._is_over.is_set() or self._work.volumes or self._work.tasks)

    def _measure(self, number: int, volume: int) -> None:
        """Measure a volume exactly, of which provisional scores are shown."""
        run = self.runs[number]
        known = run.known(volume)
        if known is None or known.is_exact:
            return
        try:
            if run.lease is None or run.plan.is_one_task:
                exact: Known | None = run.measure(volume, self._is_over, self._note)
            else:
                exact = run.measure_recorded(volume, self._note, self._is_over)
            if exact is not None:
                self._learn(number, volume, exact)
        except DataError as error:
            # Such a volume cannot be segmented; others can.
            self.problem = str(error)

    def _learn(self, number: int, volume: int, known: Known) -> None:
        run = self.runs[number]
        is_new = run.known(volume) != known
        run.learn(volume, known)
        self._provisional.pop((number, volume), None)
        if is_new:
            self.changed()

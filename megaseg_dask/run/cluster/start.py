"""Starting workers: one small function per kind of cluster, by the library that exists for it."""

import importlib
import inspect
import logging
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

from megaseg_dask.errors import EngineError, MegasegError, SettingsError
from megaseg_dask.inference.machine import count_killed, memory_bytes
from megaseg_dask.messages import closest, install_command, nearest
from megaseg_dask.plan.cluster_spec import Cluster, TlsFiles
from megaseg_dask.plan.plan import TASKS_AT_ONCE
from megaseg_dask.run.cluster import main_module
from megaseg_dask.run.cluster.dask_config import inherited
from megaseg_dask.stores import cause_of

# On loopback: a dashboard asks for no credentials, whatever the rest is protected by.
_DASHBOARD = "127.0.0.1:0"


class _BatchSystem(NamedTuple):
    """A class of dask-jobqueue, the command that submits a job, and how its answer states the job.

    Sites let their commands greet: the first number in an answer may be that of a help desk.
    """

    cluster: str
    command: str
    job_id: str


_BATCH = {
    "slurm": _BatchSystem("SLURMCluster", "sbatch", r"(?:Submitted batch job |\A)(?P<job_id>\d+)"),
    "pbs": _BatchSystem("PBSCluster", "qsub", r"(?m)^(?P<job_id>\d+)(?:\[\])?\.\S+\s*$"),
    "lsf": _BatchSystem("LSFCluster", "bsub", r"Job <(?P<job_id>\d+)>"),
    "sge": _BatchSystem("SGECluster", "qsub", r"(?:[Yy]our job |\A)(?P<job_id>\d+)"),
}
_ROLES = ("client", "scheduler", "worker")
# Decided by the rest of the file, or by us.
_OURS = {
    "n_workers",
    "security",
    "asynchronous",
    "loop",
    "self",
    "scheduler",
    "job_cls",
    "scheduler_cls",
}

# Of a custom class: decided by the file's other keys, or by how we talk to a cluster.
_DECIDED_BY_FILE = {"n_workers", "security", "asynchronous", "loop"}
_CLUSTER_METHODS = ("scale", "adapt", "close")

# Workers end within seconds, on a busy machine within a minute.
_CLOSE_S = 90.0


@contextmanager
def started(wanted: Cluster) -> Iterator[Any]:
    """Yield Dask's cluster object with the first workers on their way, and close it at the end.

    Raises:
        SettingsError: Workers cannot be started, with the reason that the batch system gives.
        EngineError: Workers of this machine cannot be started.
    """
    n_killed = count_killed()
    with ExitStack() as stack:
        if wanted.is_local:
            # Also for workers that are started again later.
            stack.enter_context(main_module.importable())
        try:
            with _Deaths.noted() as deaths:
                cluster = _KINDS[wanted.kind](wanted, stack)
            stack.callback(_close, cluster)
            _scale(wanted, cluster)
        except (MegasegError, KeyboardInterrupt):
            raise
        except Exception as error:
            if wanted.is_local:
                raise _failed_start(error, deaths, count_killed() - n_killed) from error
            raise _explained(wanted, error) from error
        yield cluster


def _close(cluster: Any) -> None:
    # A job that could not be submitted has a status that Dask does not expect at the end. A nanny
    # whose worker hung may wait for ever: the run is over by then, and what is left ends with this
    # process.
    has_timeout = "timeout" in inspect.signature(cluster.close).parameters
    limit = {"timeout": _CLOSE_S} if has_timeout else {}
    with suppress(TimeoutError, OSError, AssertionError):
        cluster.close(**limit)


def _scale(wanted: Cluster, cluster: Any) -> None:
    n_workers = _n_first_workers(wanted)
    if n_workers is None or wanted.kind == "local":
        return
    cluster.scale(n_workers)
    if wanted.kind in _BATCH:
        # Dask submits in the background.
        cluster.sync(_wait_for, cluster)
        if refused := cluster.job_cls.refused:
            raise _explained(wanted, refused[0])


def _n_first_workers(wanted: Cluster) -> int | None:
    """Return how many workers are started at first; ``None`` if the class decides that."""
    if wanted.adaptive and not wanted.workers:
        return max(wanted.adaptive.minimum, 1)
    return wanted.workers


async def _wait_for(cluster: Any) -> None:
    await cluster


def require_queued(wanted: Cluster, cluster: Any) -> None:
    """Check that a job is left whose worker may join.

    Raises:
        SettingsError: All jobs have ended before a worker joined.
    """
    if wanted.kind != "slurm":
        return
    jobs = [str(job.job_id) for job in cluster.workers.values() if job.job_id]
    if not jobs:
        return
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"]
    # An error is about jobs that are long over, or a moment of no answer.
    queue = subprocess.run(command, capture_output=True, text=True, check=False)
    is_left = bool(set(jobs) & set(queue.stdout.split()))
    if not is_left and (queue.returncode == 0 or "Invalid job id" in queue.stderr):
        raise SettingsError(
            f"kind slurm: jobs {', '.join(jobs)} ended before their workers joined; read their "
            "output (options: log_directory)"
        )


def adapt(wanted: Cluster, cluster: Any) -> None:
    """Let Dask choose the number of workers from now on, if the file says so."""
    if wanted.adaptive:
        # At least one while a run lasts: the next task would otherwise wait for a queue.
        cluster.adapt(minimum=max(wanted.adaptive.minimum, 1), maximum=wanted.adaptive.maximum)


def security_of(wanted: Cluster) -> Any:
    """Return the certificates of a cluster: made for it, from files, or ``None``."""
    from distributed import Security

    if isinstance(files := wanted.tls, TlsFiles):
        named = {"tls_ca_file": _absolute(files.ca_file)}
        for role in _ROLES:
            named[f"tls_{role}_cert"] = _absolute(files.cert)
            named[f"tls_{role}_key"] = _absolute(files.key)
        return Security(require_encryption=True, **named)
    return Security.temporary() if wanted.encrypted else None


def _absolute(path: Path) -> str:
    return str(path.expanduser().absolute())


# -- one function per kind


def _local(wanted: Cluster, _: ExitStack) -> Any:
    from distributed import LocalCluster, Nanny, Worker

    options = {**_local_options(wanted), **_options(wanted, LocalCluster, Nanny, Worker)}
    return LocalCluster(n_workers=wanted.workers or 1, **options)


def _local_options(wanted: Cluster) -> dict[str, Any]:
    # One thread per worker: a task already uses all threads that the plan gives a forward pass.
    return {
        "threads_per_worker": 1,
        "processes": True,
        "memory_limit": 0,
        "dashboard_address": _DASHBOARD,
        "host": "127.0.0.1",
        "security": security_of(wanted),
    }


def _cuda(wanted: Cluster, _: ExitStack) -> Any:
    from megaseg_dask.inference.gpu import require_devices

    devices = require_devices()
    n_devices = len(devices)
    max_workers = wanted.workers
    if wanted.adaptive and not max_workers:
        max_workers = wanted.adaptive.maximum
    if max_workers and max_workers > n_devices:
        raise SettingsError(
            f"{max_workers} workers: there are {n_devices} GPUs here, and each worker needs one of "
            "its own"
        )
    return _gpu_cluster(wanted, devices, _n_first_workers(wanted) or n_devices)


def _gpu_cluster(wanted: Cluster, devices: list[str], n_workers: int) -> Any:
    """Return dask-cuda's local cluster where it can be used, or a plain one with the same pins.

    A worker of dask-cuda runs on the processors beside its GPU, and tells Dask's page about it.
    """
    from distributed import LocalCluster, Nanny, Worker

    from megaseg_dask.run.cluster.gpus import GpuCluster

    takers: list[Any] = [LocalCluster, Nanny, Worker]
    # One thread computes, while others read and write.
    options = {**_local_options(wanted), "threads_per_worker": TASKS_AT_ONCE["cuda"]}
    try:
        from dask_cuda import LocalCUDACluster
        from pynvml import NVMLError
    except ImportError:
        return GpuCluster(devices, n_workers, **options, **_options(wanted, *takers))
    options |= {"device_memory_limit": 0, **_options(wanted, LocalCUDACluster, *takers)}
    try:
        return LocalCUDACluster(CUDA_VISIBLE_DEVICES=devices, n_workers=n_workers, **options)
    except NVMLError as error:
        raise EngineError(
            f"dask-cuda cannot ask the driver of the GPUs ({error}); run nvidia-smi, or uninstall "
            "dask-cuda to work without it"
        ) from error


def _batch(wanted: Cluster, stack: ExitStack) -> Any:
    system = _BATCH[wanted.kind]
    library = _library("dask_jobqueue", "jobqueue")
    cls = getattr(library, system.cluster)
    options = {"processes": 1, **_options(wanted, cls, *_ancestors(cls.job_cls))}
    folder = options.pop("shared_temp_directory", ".")
    exports = [f"export {key}={value}" for key, value in inherited().items()]
    # Of two --nthreads the last counts: a task uses all cores of its worker.
    arguments = ["--nthreads", _n_threads(wanted), "--no-dashboard"]
    options["job_script_prologue"] = [*exports, *options.get("job_script_prologue", ())]
    options["worker_extra_args"] = [*arguments, *options.get("worker_extra_args", ())]
    options["scheduler_options"] = {
        "dashboard_address": _DASHBOARD,
        **options.get("scheduler_options", {}),
    }
    return cls(
        n_workers=0,
        job_cls=_job_class(cls.job_cls, system),
        security=_in_files(security_of(wanted), folder, stack),
        **options,
    )


def _job_class(job_cls: Any, system: _BatchSystem) -> Any:
    """Return the class of a job that keeps the error of a refusal; Dask would log it and go on."""
    from distributed.core import Status

    class Job(job_cls):  # type: ignore[misc]  # known when it is called
        refused: ClassVar[list[Exception]] = []

        def _job_id_from_submit_output(self, output: str) -> str:
            if found := re.search(system.job_id, output):
                return found["job_id"]
            raise ValueError(f"{system.command} did not state a job; it printed: {output}")

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, OSError, ValueError) as error:
                # Without its traceback, which would keep this object from being forgotten.
                self.refused.append(type(error)(*error.args))
                self.status = Status.running

        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return Job


def _n_threads(wanted: Cluster) -> str:
    """Return how many tasks a worker takes at once, as an option of Dask's command."""
    return str(TASKS_AT_ONCE.get(wanted.device or "cpu", 1))


def _in_files(security: Any, folder: str, stack: ExitStack) -> Any:
    """Write certificates that were made for a cluster to files that its jobs can read.

    Jobs begin in the folder of the command. The library would do so too, with files
    that it closes at a time of its choice.
    """
    is_text = security is not None and "\n" in security.tls_ca_file
    if not is_text:
        return security
    temporary = tempfile.TemporaryDirectory(prefix=".megaseg-", dir=Path(folder).expanduser())
    # The folder is readable by its owner alone.
    target = Path(stack.enter_context(temporary))
    certificates = [f"tls_{role}_cert" for role in _ROLES]
    keys = [f"tls_{role}_key" for role in _ROLES]
    for name in ("tls_ca_file", *certificates, *keys):
        path = target / name
        path.write_text(getattr(security, name))
        setattr(security, name, str(path.absolute()))
    return security


def _kubernetes(wanted: Cluster, _: ExitStack) -> Any:
    library = _library("dask_kubernetes.operator", "kubernetes")
    options = _options(wanted, library.KubeCluster, library.make_cluster_spec)
    parameters = inspect.signature(library.make_cluster_spec).parameters
    spec_options = {key: options.pop(key) for key in parameters if key in options}
    spec = options.pop("custom_cluster_spec", None)
    if not spec:
        spec = kubernetes_spec(
            n_workers=wanted.workers or 1, n_threads=_n_threads(wanted), **spec_options
        )
    return library.KubeCluster(custom_cluster_spec=spec, quiet=True, **options)


def kubernetes_spec(
    name: str = "megaseg",
    *,
    env: Mapping[str, str] | None = None,
    worker_command: Iterable[str] | str = (),
    n_threads: str = "1",
    **options: Any,
) -> dict[str, Any]:
    """Return the DaskCluster resource, with our settings in the environment.

    The scheduler gets no GPU.
    """
    command = worker_command or ["dask", "worker", "--nthreads", n_threads]
    library = _library("dask_kubernetes.operator", "kubernetes")
    spec: dict[str, Any] = library.make_cluster_spec(
        name, env={**inherited(), **(env or {})}, worker_command=command, **options
    )
    (container,) = spec["spec"]["scheduler"]["spec"]["containers"]
    # The operator's own function gives the scheduler what a worker gets.
    resources = container.get("resources") or {}
    if resources:
        container["resources"] = {kind: _without_gpu(resources[kind]) for kind in resources}
    return spec


def _without_gpu(amounts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: amount for key, amount in amounts.items() if not key.endswith("/gpu")}


def _custom(wanted: Cluster, _: ExitStack) -> Any:
    cls = _cluster_class(wanted.class_name or "")
    options = dict(wanted.options)
    for key in _DECIDED_BY_FILE & options.keys():
        raise SettingsError(f"options.{key}: this follows from the rest of the file; remove it")
    if wanted.tls:
        options["security"] = security_of(wanted)
    n_workers = _n_first_workers(wanted)
    if n_workers is not None and "n_workers" in inspect.signature(cls).parameters:
        # The class could otherwise start more, only to have them stopped again.
        options["n_workers"] = n_workers
    return cls(**options)


def _cluster_class(name: str) -> Any:
    """Return the class that ``package:Class`` names.

    Raises:
        SettingsError: It is not there, or not a class of Dask clusters.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingsError(
            f"class {name}: {error}; install its package in the environment of megaseg-dask"
        ) from error
    cls = getattr(module, class_name, None)
    if cls is None:
        raise SettingsError(
            f"class {name}: {module_name} has no {class_name}{_classes_like(class_name, module)}"
        )
    has_methods = all(callable(getattr(cls, method, None)) for method in _CLUSTER_METHODS)
    if not isinstance(cls, type) or not has_methods:
        raise SettingsError(
            f"class {name}: expected a class of Dask clusters, with the methods "
            f"{', '.join(_CLUSTER_METHODS)}; give another class"
        )
    return cls


def _classes_like(name: str, module: ModuleType) -> str:
    classes = [each for each, value in vars(module).items() if isinstance(value, type)]
    meant = closest(name, classes)
    return f"; did you mean {meant}?" if meant else "; see the package's own documentation"


_KINDS: dict[str, Callable[[Cluster, ExitStack], Any]] = {
    "local": _local,
    "cuda": _cuda,
    "kubernetes": _kubernetes,
    "custom": _custom,
    **dict.fromkeys(_BATCH, _batch),
}


# -- options of the libraries, and what they say


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise SettingsError(
            f"this kind of cluster needs {package}: {install_command(extra)}"
        ) from error


def _ancestors(cls: type) -> Iterator[Any]:
    # Each class of the library passes on what it does not know itself.
    for parent in cls.__mro__:
        if "__init__" in vars(parent) and parent is not object:
            yield parent
    yield _library("dask_jobqueue.core", "jobqueue").JobQueueCluster


def _options(wanted: Cluster, *takers: Any) -> dict[str, Any]:
    """Return the options of the file, which its library takes.

    Raises:
        SettingsError: The library does not take one of them.
    """
    known: set[str] = set()
    for taker in takers:
        known.update(inspect.signature(taker).parameters)
    known -= _OURS | {"args", "kwargs"}
    for key in wanted.options:
        if key not in known:
            raise SettingsError(
                f"options: {wanted.kind} takes no {key}{nearest(key, sorted(known))}"
            )
    return dict(wanted.options)


def _explained(wanted: Cluster, error: Exception) -> MegasegError:
    """Return an error of a library or of a batch system as one line."""
    if isinstance(error, FileNotFoundError) and wanted.kind in _BATCH:
        command = _BATCH[wanted.kind].command
        return SettingsError(
            f"kind {wanted.kind}: there is no {command} command here; run megaseg where jobs are "
            "submitted"
        )
    text = str(error) or type(error).__name__
    output = re.search(r"stderr:\n(.+)", text, re.DOTALL)
    reason = output[1] if output else text
    return SettingsError(f"kind {wanted.kind}: {' '.join(reason.split())}")


# -- workers of this machine that end as they start


class _Deaths(logging.Handler):
    """How workers ended, as only Dask's log says."""

    def __init__(self) -> None:
        super().__init__()
        self.signals: list[int] = []
        self.statuses: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Note a line about the end of a worker."""
        found = re.search(r"(killed by signal|exited with status) (\d+)", record.getMessage())
        if found:
            ends = self.signals if "signal" in found[1] else self.statuses
            ends.append(int(found[2]))

    @classmethod
    @contextmanager
    def noted(cls) -> "Iterator[_Deaths]":
        """Yield what is noted meanwhile; the log shows nothing."""
        logger = logging.getLogger("distributed.nanny")
        level = logger.level
        propagates = logger.propagate
        deaths = cls()
        logger.addHandler(deaths)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield deaths
        finally:
            logger.removeHandler(deaths)
            logger.setLevel(level)
            logger.propagate = propagates


def _failed_start(error: Exception, deaths: _Deaths, n_killed: int) -> EngineError:
    """Return why workers of this machine could not start, as far as that is known."""
    room = f"this machine, or its container, has {memory_bytes() / 1e9:.1f} GB"
    cause = _first_cause(error)
    if "Nanny failed" not in str(cause):
        # A worker that told its error is ended by its nanny.
        reason = cause_of(cause)
    elif n_killed > 0:
        reason = f"one was killed because memory ran out ({room}); use fewer --workers"
    elif signal.SIGKILL in deaths.signals:
        reason = f"one was killed by SIGKILL; memory may have run out ({room})"
    elif deaths.signals:
        reason = f"one was killed by {signal.Signals(deaths.signals[0]).name}; find what sends it"
    elif deaths.statuses:
        reason = (
            f"one ended with exit status {deaths.statuses[0]}, and said why on stderr"
            f"{main_module.advice()}"
        )
    else:
        reason = str(cause)
    return EngineError(f"workers could not start: {reason}; then run the same command again")


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error

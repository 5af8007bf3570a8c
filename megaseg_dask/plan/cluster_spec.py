"""Cluster files: where workers run, how many there are, and what each of them has.

``--scheduler`` and local workers are the same declaration with the rest left out.
The plan reads it too: threads, device and memory of a worker are those of its job,
not those of the machine on which the command is typed.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import nearest, validation_message
from megaseg_dask.plan.memory import BUDGET_SHARE
from megaseg_dask.plan.option_types import Natural, Positive, Seconds, bytes_of, seconds_of
from megaseg_dask.plan.settings import Settings

Kind = Literal["local", "cuda", "scheduler", "slurm", "pbs", "lsf", "sge", "kubernetes", "custom"]

# Workers are jobs of a batch system; a job may hold several of them.
BATCH = ("slurm", "pbs", "lsf", "sge")
# Workers are processes of this machine: they see its files, and nothing has to be sent to them.
LOCAL = ("local", "cuda")

# Unless the file says it, a job's worker takes no further task after this share of its wall time,
# give or take that share.
_LIFETIME_SHARE = 0.85
_STAGGER_SHARE = 0.05

# A class, as cluster files name it: package.module:Class.
_CLASS = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Adaptive(_Strict):
    """As many workers as there is work for, between two numbers."""

    minimum: Natural = 0
    maximum: Positive

    @model_validator(mode="after")
    def _in_order(self) -> "Adaptive":
        if self.maximum < self.minimum:
            raise ValueError(f"maximum {self.maximum} is below minimum {self.minimum}")
        return self


class TlsFiles(_Strict):
    """Certificates in PEM files that client, scheduler and workers share."""

    ca_file: Path
    cert: Path
    key: Path

    @model_validator(mode="after")
    def _present(self) -> "TlsFiles":
        for path in (self.ca_file, self.cert, self.key):
            if not path.expanduser().is_file():
                raise ValueError(f"{path} is not there")
        return self


def _parse_tls(value: object) -> object:
    if not isinstance(value, bool | dict | TlsFiles | None):
        raise ValueError("expected true, false, or the keys ca_file, cert and key")
    return value


def _parse_class(value: object) -> object:
    if not isinstance(value, str) or not _CLASS.fullmatch(value):
        raise ValueError("expected package:Class, such as dask_jobqueue:HTCondorCluster")
    return value


class Cluster(_Strict):
    """Where the workers of a run are; unknown keys are refused."""

    kind: Kind
    workers: Positive | None = None
    adaptive: Adaptive | None = None
    # A worker takes no further task after this time, and leaves: before the wall time ends, and not
    # all workers at once.
    lifetime: Seconds | None = None
    lifetime_stagger: Seconds | None = None
    tls: Annotated[bool | TlsFiles | None, BeforeValidator(_parse_tls)] = None
    address: str | None = None
    # Of kind custom: any Dask cluster class, as package:Class.
    class_name: Annotated[str | None, BeforeValidator(_parse_class), Field(alias="class")] = None
    # The device of a worker; `--device auto` means it.
    device: Literal["cpu", "cuda"] | None = None
    # How long a run waits for its first worker, and for one to come back when all are gone.
    wait: Seconds | None = None
    # Given to the library's own class as they are.
    options: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Cluster":
        if (self.kind == "scheduler") != (self.address is not None):
            raise ValueError("address is needed with kind scheduler, and allowed only there")
        if (self.kind == "custom") != (self.class_name is not None):
            raise ValueError("class is needed with kind custom, and allowed only there")
        if self.kind == "scheduler":
            self._require_running_scheduler()
        if self.kind == "kubernetes" and self.tls:
            raise ValueError(
                "tls: the operator does not encrypt; use a network policy to keep other pods out"
            )
        if self.workers and self.adaptive:
            raise ValueError("workers and adaptive: give only one of them")
        if isinstance(self.options.get("walltime"), int):
            # SLURM would take the seconds that YAML makes of 12:00:00 for minutes.
            raise ValueError(
                'options.walltime: write it in quotes, such as "12:00:00"; '
                "without quotes YAML reads a number"
            )
        # Read here too, so that an error names the file.
        self.memory_bytes()
        self._require_lifetime()
        return self

    def _require_running_scheduler(self) -> None:
        """Raise if the file decides what was decided when the scheduler started."""
        for name in ("workers", "adaptive", "lifetime", "options"):
            if getattr(self, name):
                raise ValueError(f"{name}: the scheduler decides this; remove it")
        if self.tls is True:
            raise ValueError(
                "tls: the scheduler already has certificates; give ca_file, cert and key"
            )

    def _require_lifetime(self) -> None:
        """Raise if a worker would stay longer than its job."""
        lifetime = self.lifetime or 0
        stagger = self.lifetime_stagger or 0
        if stagger and stagger >= lifetime:
            raise ValueError("lifetime_stagger: must be less than lifetime")
        if self.wall_s and lifetime + stagger >= self.wall_s:
            raise ValueError(
                "lifetime: lifetime plus lifetime_stagger must be less than options.walltime"
            )

    @property
    def wall_s(self) -> float | None:
        """Wall time of a job in seconds; ``None`` unless the file says it in a form we know."""
        text = str(self.options.get("walltime", ""))
        if self.kind == "lsf":
            # LSF counts hours and minutes, where the others count minutes and seconds.
            text += ":00"
        try:
            return float(seconds_of(text))
        except ValueError:
            return None

    @property
    def lifetime_s(self) -> tuple[float, float] | None:
        """Seconds after which a worker leaves, and their variation; ``None`` if it stays."""
        if self.lifetime is not None:
            return self.lifetime, self.lifetime_stagger or 0.0
        if self.wall_s is not None:
            return _LIFETIME_SHARE * self.wall_s, _STAGGER_SHARE * self.wall_s
        return None

    @property
    def is_local(self) -> bool:
        """Whether workers are processes of this machine."""
        return self.kind in LOCAL

    @property
    def is_queued(self) -> bool:
        """Whether a worker may have to wait for the work of others."""
        return self.kind in (*BATCH, "kubernetes", "custom")

    @property
    def encrypted(self) -> bool:
        """Whether certificates are made for it.

        Jobs talk over a network that others share, and loopback is open to all users of a machine.
        """
        return self.kind in (*BATCH, *LOCAL) if self.tls is None else self.tls is True

    @property
    def processes(self) -> int:
        """Workers of one job."""
        return self._whole_option("processes") or 1

    def _whole_option(self, name: str) -> int:
        return int(str(self.options.get(name) or 0))

    def defaults(self) -> dict[str, object]:
        """Return the settings that follow from what a worker is known to have."""
        settings: dict[str, object] = {}
        if self.device is not None:
            settings["device"] = self.device
        elif self.kind == "cuda":
            settings["device"] = "cuda"
        n_cores = self._whole_option("cores") if self.kind in BATCH else 0
        if n_cores:
            settings["threads"] = max(n_cores // self.processes, 1)
        return settings

    def memory_bytes(self) -> int | None:
        """Return what a worker may plan with, if the file says the memory of a job.

        Raises:
            ValueError: It is no size.
        """
        if self.kind not in BATCH or "memory" not in self.options:
            return None
        text = str(self.options["memory"])
        try:
            n_bytes = bytes_of(text)
        except ValueError as error:
            raise ValueError(f"options.memory {text}: {error}") from error
        return int(n_bytes * BUDGET_SHARE) // self.processes


def cluster_of(settings: Settings) -> Cluster:
    """Return where the workers of these settings are.

    Raises:
        SettingsError: The settings contradict each other, or the cluster file is wrong.
    """
    if settings.workers == 0 and (settings.cluster or settings.scheduler):
        raise SettingsError(
            "--workers 0 runs in this process; remove it, or remove --scheduler and --cluster"
        )
    if settings.cluster is None:
        if settings.scheduler is not None:
            return Cluster(kind="scheduler", address=settings.scheduler)
        return Cluster(kind="local", workers=settings.workers or None)
    if settings.scheduler is not None:
        raise SettingsError(
            "--scheduler and --cluster: give only one of them; a cluster file of kind scheduler "
            "holds an address"
        )
    cluster = read_cluster(settings.cluster)
    if settings.workers is None or cluster.kind == "scheduler":
        return cluster
    return cluster.model_copy(update={"workers": settings.workers, "adaptive": None})


def read_cluster(path: str) -> Cluster:
    """Read a cluster file.

    Raises:
        SettingsError: It cannot be read, or a key is wrong; one line names the file and the key.
    """
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--cluster {path}: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--cluster {path}: expected keys and values, such as kind: slurm")
    try:
        return Cluster.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"--cluster {path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """Return one problem: a misspelt key goes before a wrong value."""
    problems = error.errors()
    # Of a union the problem is that of the member that was meant, which is never the flag.
    problems.sort(key=lambda each: (each["type"] != "extra_forbidden", "bool" in each["loc"]))
    problem = problems[0]
    keys = [key for key in map(str, problem["loc"]) if key != "bool" and "TlsFiles" not in key]
    name = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name}{nearest(keys[-1], _keys_beside(keys))}"
    message = validation_message(problem)
    return f"{name}: {message}" if name else message


def _keys_beside(keys: list[str]) -> Iterable[str]:
    """Return the keys that there are in the place of the last of ``keys``."""
    model: type[BaseModel] = Cluster
    if len(keys) > 1:
        model = TlsFiles if keys[0] == "tls" else Adaptive
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())

"""What a cluster file says: where workers run, how many, and what each of them has.

`--scheduler` and local workers are the same declaration with the rest left out.
It is data for the plan too: threads, device and memory of a worker are those of
its job, not of the machine on which the command is typed.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import closest, validation_message
from megaseg_dask.plan.memory import BUDGET_SHARE
from megaseg_dask.plan.parsing import parse_bytes, parse_duration
from megaseg_dask.plan.settings import Positive, Settings

Kind = Literal["local", "cuda", "scheduler", "slurm", "pbs", "lsf", "sge", "kubernetes"]
Seconds = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]

# Started by a batch system, one job for each worker or several.
BATCH = ("slurm", "pbs", "lsf", "sge")
# Processes of this machine: they see its files, and nothing has to be sent to them.
LOCAL = ("local", "cuda")

# Without a lifetime a job's worker takes no further task after this share of its wall time, give or take that share.
_LIFETIME, _STAGGER = 0.85, 0.05


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Adaptive(_Strict):
    """As many workers as there is work for, between two numbers."""

    minimum: int = Field(0, ge=0)
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


def _parse_tls(value: Any) -> Any:
    if not isinstance(value, bool | dict | TlsFiles | None):
        raise ValueError("expected true, false, or the files ca_file, cert and key")
    return value


class Cluster(_Strict):
    """Where the workers of a run are; unknown keys are refused."""

    kind: Kind
    workers: Positive | None = None
    adaptive: Adaptive | None = None
    # A worker takes no further task after so long, and leaves: less than the wall time, and not all at once.
    lifetime: Seconds | None = None
    lifetime_stagger: Seconds | None = None
    tls: Annotated[bool | TlsFiles | None, BeforeValidator(_parse_tls)] = None
    address: str | None = None
    # What a worker has; `--device auto` means it.
    device: Literal["cpu", "cuda"] | None = None
    # How long to wait for the first worker, and for one to come back when all are gone.
    wait: Seconds | None = None
    # Given to the library's own class as they are.
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Cluster":
        if (self.kind == "scheduler") != (self.address is not None):
            raise ValueError(
                "address is where the scheduler of kind scheduler is, and of no other kind"
            )
        if self.kind == "scheduler":
            for name in ("workers", "adaptive", "lifetime", "options"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name}: whoever started the scheduler decides that; leave it out"
                    )
            if self.tls is True:
                raise ValueError(
                    "tls: a scheduler that runs has its certificates; name ca_file, cert and key"
                )
        if self.kind == "kubernetes" and self.tls:
            raise ValueError(
                "tls: the operator encrypts nothing; keep other pods out by a network policy"
            )
        if self.workers and self.adaptive:
            raise ValueError("workers and adaptive: give one of them")
        if self.lifetime_stagger and self.lifetime_stagger >= (self.lifetime or 0):
            raise ValueError("lifetime_stagger: has to be less than lifetime")
        if isinstance(self.options.get("walltime"), int):
            # SLURM would take the seconds that YAML makes of 12:00:00 for minutes.
            raise ValueError(
                'options.walltime: write it in quotes, such as "12:00:00"; YAML makes a number of it'
            )
        self.memory_bytes()  # options.memory is read here too, so that what is wrong with it is told with its file
        if self.wall_s and (self.lifetime or 0) + (self.lifetime_stagger or 0) >= self.wall_s:
            raise ValueError(
                "lifetime: has to end before options.walltime, lifetime_stagger included"
            )
        return self

    @property
    def wall_s(self) -> float | None:
        """Wall time of a job in seconds, if the file tells it in hours, minutes and seconds."""
        # LSF counts hours and minutes, where the others count minutes and seconds.
        end = ":00" if self.kind == "lsf" else ""
        try:
            return float(parse_duration(f"{self.options['walltime']}{end}"))
        except (KeyError, ValueError, TypeError):
            return None

    @property
    def lifetime_s(self) -> tuple[float, float] | None:
        """After how many seconds a worker leaves, and by how many that varies; ``None`` if it stays."""
        if self.lifetime is None and self.wall_s is not None:
            return _LIFETIME * self.wall_s, _STAGGER * self.wall_s
        return None if self.lifetime is None else (self.lifetime, self.lifetime_stagger or 0.0)

    @property
    def is_local(self) -> bool:
        """Tell whether workers are processes of this machine."""
        return self.kind in LOCAL

    @property
    def is_queued(self) -> bool:
        """Tell whether a worker may have to wait for somebody else's."""
        return self.kind in (*BATCH, "kubernetes")

    @property
    def encrypted(self) -> bool:
        """Tell whether certificates are made for it; jobs talk over a network that others share."""
        return self.kind in BATCH if self.tls is None else self.tls is True

    @property
    def processes(self) -> int:
        """Workers of one job."""
        return int(self.options.get("processes") or 1)

    def defaults(self) -> dict[str, object]:
        """Return settings that follow from what a worker has; only those that are known."""
        found: dict[str, object] = {}
        if device := self.device or ("cuda" if self.kind == "cuda" else None):
            found["device"] = device
        cores = self.options.get("cores")
        if self.kind in BATCH and cores:
            found["threads"] = max(int(cores) // self.processes, 1)
        return found

    def memory_bytes(self) -> int | None:
        """Return what a worker may plan with, if the file says how much memory it gets."""
        if self.kind not in BATCH or "memory" not in self.options:
            return None
        return int(_job_bytes(self.options["memory"]) * BUDGET_SHARE) // self.processes


def _job_bytes(value: object) -> int:
    try:
        n_bytes = parse_bytes(str(value))
    except ValueError as error:
        raise ValueError(f"options.memory {value}: {error}") from error
    assert isinstance(n_bytes, int)
    return n_bytes


def cluster_of(options: Settings) -> Cluster:
    """Return where the workers of these settings are.

    Raises :class:`SettingsError` that names the file, its key and what it takes.
    """
    if options.workers == 0 and (options.cluster or options.scheduler):
        raise SettingsError(
            "--workers 0 runs in this process: leave it out, or leave out --scheduler and --cluster"
        )
    if options.cluster is None:
        if options.scheduler is not None:
            return Cluster(kind="scheduler", address=options.scheduler)
        return Cluster(kind="local", workers=options.workers or None)
    if options.scheduler is not None:
        raise SettingsError(
            "--scheduler and --cluster: give one of them; a file of kind scheduler holds an address"
        )
    found = read_cluster(options.cluster)
    if options.workers is None or found.kind == "scheduler":
        return found
    return found.model_copy(update={"workers": options.workers, "adaptive": None})


def read_cluster(path: str) -> Cluster:
    """Read a cluster file; raises :class:`SettingsError`."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--cluster {path}: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"--cluster {path}: expected keys and values, such as kind: slurm")
    try:
        return Cluster.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"--cluster {path}: {_problem(error)}") from error


def _problem(error: ValidationError) -> str:
    found = error.errors()
    # A misspelt key first, and of a union what is wrong with the member that was meant.
    found.sort(key=lambda problem: (problem["type"] != "extra_forbidden", "bool" in problem["loc"]))
    problem = found[0]
    keys = [str(part) for part in problem["loc"] if part != "bool" and "TlsFiles" not in str(part)]
    name = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        members: dict[str, type[BaseModel]] = {"adaptive": Adaptive, "tls": TlsFiles}
        known = members.get(keys[0] if len(keys) > 1 else "", Cluster).model_fields
        return f"no such key: {name}{nearest(keys[-1], known)}"
    message = validation_message(problem)
    return f"{name}: {message}" if name else message


def nearest(name: str, known: Any) -> str:
    """Return the advice that ends a line about an unknown name."""
    found = closest(name, known)
    return f"; did you mean {found}?" if found else f"; there are {', '.join(sorted(known))}"


def _one_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())

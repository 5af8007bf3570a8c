"""Every option of a run, declared once.

The command line, the keywords of :func:`megaseg_dask.segment` and the table in
the docs are made from this class. A field marked ``result`` can change the
output, and so belongs to the fingerprint of a plan; the others only say how
and where the work is done, and may differ when a run resumes.
"""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from megaseg_dask.errors import SettingsError

OUTPUTS = ("labels", "scores", "mask")
_BYTES = {
    "": 1,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def _split(convert: Callable[[str], Any], n: int) -> Callable[[Any], Any]:
    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return (value,) * n if isinstance(value, int | float) else value
        parts = value.replace("x", ",").split(",")
        return tuple(map(convert, parts * n if len(parts) == 1 else parts))

    return parse


def _parse_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]I?B|)", value.strip().upper())
    if not found:
        raise ValueError("expected a size such as 8GB or 500MiB")
    return int(float(found[1]) * _BYTES[found[2]])


def _parse_names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def _parse_time(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\d*:\d*", value):
        start, stop = value.split(":")
        return (int(start or 0), int(stop) if stop else None)
    if isinstance(value, str) and value.isdigit():
        return (int(value), int(value) + 1)
    return value


Triple = Annotated[tuple[int, int, int], BeforeValidator(_split(int, 3))]
Fractions = Annotated[tuple[float, float, float], BeforeValidator(_split(float, 3))]
Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(gt=0)]
Names = Annotated[tuple[str, ...], BeforeValidator(_parse_names)]
TimeRange = Annotated[tuple[int, int | None], BeforeValidator(_parse_time)]


def _option(default: Any, help_: str, metavar: str | None = None, *, result: bool = False, **rules: Any) -> Any:
    return Field(default, description=help_, json_schema_extra={"result": result, "metavar": metavar}, **rules)


class Settings(BaseModel):
    """The options of ``segment`` and ``plan``; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    model: str = _option("MegaSeg_v1", "Name of a model, or path of a bundle folder, zip or .ckpt.", "NAME|PATH")
    channel: str | None = _option(
        None,
        "Channel to segment, by name or index; needed if the source has several.",
        "NAME|INDEX",
        result=True,
    )
    time: TimeRange | None = _option(None, "Timepoints to segment, half-open; all by default.", "A:B", result=True)
    level: int = _option(0, "Resolution level to segment; 0 is the finest.", "N", result=True, ge=0)
    patch: Triple | None = _option(
        None,
        "Voxels that the network sees at once. (default: the bundle's, else 64,128,128)",
        "Z,Y,X",
        result=True,
    )
    overlap: Fractions | None = _option(
        None, "Overlap of patches, once or per axis. (default: the bundle's, else 0.25)", "F", result=True
    )
    threshold: float = _option(0.5, "A voxel is foreground if its score is above this.", "F", result=True, ge=0, le=1)
    connectivity: Literal[1, 2, 3] = _option(
        1, "Voxels of one object touch by faces (1), edges (2) or corners (3).", "1|2|3", result=True
    )
    min_size: int = _option(0, "Drop objects of fewer voxels.", "N", result=True, ge=0)
    nan_to_background: bool = _option(
        False, "Treat NaN and infinite voxels as background, not as an error.", result=True
    )
    outputs: Names = _option(("labels", "scores"), "What to write: labels, scores, mask.", "LIST", result=True)
    scores_dtype: Literal["uint8", "float32"] = _option(
        "uint8", "uint8 stores 255 times the score, rounded.", "uint8|float32", result=True
    )
    label_name: str = _option(
        "megaseg", "Name of the label image.", "NAME", result=True, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$"
    )
    ome_zarr: Literal["0.4", "0.5"] = _option("0.5", "OME-Zarr version to write.", "0.4|0.5", result=True)
    block: Triple | None = _option(
        None,
        "Voxels of one task; any shape gives the same result. (default: from --memory)",
        "Z,Y,X",
        result=True,
    )
    engine: Literal["auto", "torch"] = _option("auto", "What runs the network.", "auto|torch", result=True)
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "Where the network runs; auto is a GPU if there is one.", "auto|cpu|cuda", result=True
    )
    precision: Literal["auto", "fp32"] = _option(
        "auto", "Arithmetic inside the network; fp32 has TF32 off.", "auto|fp32", result=True
    )
    batch: int | None = _option(None, "Patches per forward pass. (default: 1)", "N", result=True, gt=0)
    threads: int | None = _option(
        None, "CPU threads of one forward pass; part of the result's last bits. (default: the cores of this machine)",
        "N", result=True, gt=0,
    )  # fmt: skip
    memory: Bytes | None = _option(
        None, "Memory of one worker. (default: 8GB, or its share of this machine if that is less)", "8GB"
    )
    workers: int | None = _option(None, "Worker processes. (default: one, or one per GPU)", "N", gt=0)
    scheduler: str | None = _option(None, "Use the running Dask scheduler at this address.", "ADDRESS")
    retries: int = _option(3, "Further attempts for a task whose worker or store failed.", "N", ge=0)
    overwrite: bool = _option(False, "Start anew where another run's output stands.")

    @field_validator("outputs")
    @classmethod
    def _known_outputs(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(outputs) - set(OUTPUTS):
            raise ValueError(f"unknown {', '.join(sorted(unknown))}; choose from {', '.join(OUTPUTS)}")
        if not outputs:
            raise ValueError(f"nothing to write; choose from {', '.join(OUTPUTS)}")
        return tuple(name for name in OUTPUTS if name in outputs)

    def result_options(self) -> dict[str, object]:
        """Return the options that can change the output, as JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if is_result(k)}

    def filled(self, values: Mapping[str, object]) -> "Settings":
        """Return these settings with what is left open (``None`` or ``auto``) taken from ``values``."""
        open_ = {k: v for k, v in values.items() if getattr(self, k) in (None, "auto")}
        return Settings.model_validate({**self.model_dump(), **open_})


def is_result(name: str) -> bool:
    """Tell whether an option can change the output."""
    extra = Settings.model_fields[name].json_schema_extra
    return isinstance(extra, dict) and bool(extra["result"])


def parse_settings(values: Mapping[str, object]) -> Settings:
    """Validate options given as text or as Python values.

    Raises :class:`SettingsError` that names the option, its value and what it takes.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        option = f"--{name.replace('_', '-')}"
        if problem["type"] == "extra_forbidden":
            raise SettingsError(f"no such option: {name}") from error
        extra = Settings.model_fields[name].json_schema_extra
        takes = extra.get("metavar") if isinstance(extra, dict) else None
        message = str(problem["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"{option} {_shown(values.get(name))}: {message} (takes {takes})") from error


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)

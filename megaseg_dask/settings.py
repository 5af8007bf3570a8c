"""Every option of a run, declared once.

The command line, the keywords of :func:`megaseg_dask.segment` and the table in
the docs are made from this class. A field marked ``result`` can change the
output, and so belongs to the fingerprint of a plan; the others only say how
and where the work is done, and may differ when a run resumes.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from megaseg_dask.errors import SettingsError

OUTPUTS = ("labels", "scores", "mask")
# Named here too, so that --help need not load what computes them.
THRESHOLDS = ("otsu", "yen", "isodata", "minimum", "triangle", "li")

# Headings of the command line's help.
SOURCE = "What to segment"
NETWORK = "The network"
OUTPUT = "What to write"
RUN = "Where and how it runs"

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


def _parse_three(value: Any) -> Any:
    if isinstance(value, str):
        value = value.replace("x", ",").split(",")
    parts = tuple(value) if isinstance(value, Iterable) else (value,)
    if len(parts) not in (1, 3):
        raise ValueError(f"expected three numbers z,y,x, or one for all axes; found {len(parts)}")
    return parts * 3 if len(parts) == 1 else parts


def _parse_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+|\d*\.\d+)\s*([KMGT]I?B|)", value.strip().upper())
    if not found:
        raise ValueError("expected a size such as 8GB or 500MiB")
    return int(float(found[1]) * _BYTES[found[2]])


def _parse_names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def _parse_time(value: Any) -> Any:
    if isinstance(value, Integral):
        return (int(value), int(value) + 1)
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d*)(:?)(\d*)", value.strip(), re.ASCII)
    if not found or value.strip() == "":
        raise ValueError("expected timepoints such as 0:10, 5: or 7")
    first, colon, stop = found.groups()
    return (int(first or 0), int(stop) if stop else None) if colon else (int(first), int(first) + 1)


def _parse_threshold(value: Any) -> Any:
    if isinstance(value, str) and value in THRESHOLDS:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a number from 0 to 1, or one of {', '.join(THRESHOLDS)}") from None
    if not 0 <= number <= 1:
        raise ValueError("expected a score from 0 to 1")
    return number


def _parse_normalization(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"level:\d+", value.strip(), re.ASCII):
        return value.strip()
    parts = value.split(",") if isinstance(value, str) else value
    try:
        mean, std = map(float, parts)
    except (TypeError, ValueError):
        raise ValueError("expected two numbers MEAN,STD, or level:N") from None
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError("expected a finite mean and a standard deviation above 0")
    return (mean, std)


def _require_range(value: tuple[int, int | None]) -> tuple[int, int | None]:
    first, stop = value
    if first < 0 or (stop is not None and stop <= first):
        raise ValueError("expected a range of one timepoint or more, counted from 0")
    return value


def _parse_text(value: Any) -> Any:
    # From Python a channel may be an index, a model a Path and a version a number.
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value == "":
        raise ValueError("expected something")
    return str(value) if isinstance(value, Integral | float) else value


def _parse_whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d+", value, re.ASCII) else value


Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Triple = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_parse_three)]
Fractions = Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(_parse_three)]
Bytes = Annotated[Positive, BeforeValidator(_parse_bytes)]
Names = Annotated[tuple[str, ...], BeforeValidator(_parse_names)]
TimeRange = Annotated[tuple[int, int | None], BeforeValidator(_parse_time), AfterValidator(_require_range)]
Text = Annotated[str, BeforeValidator(_parse_text)]
Threshold = Annotated[float | str, BeforeValidator(_parse_threshold)]
MeanStd = Annotated[tuple[float, float] | str, BeforeValidator(_parse_normalization)]


def _option(
    panel: str, default: Any, help_: str, metavar: str | None = None, *, result: bool = False, **rules: Any
) -> Any:
    extra: dict[str, Any] = {"panel": panel, "metavar": metavar, "result": result}
    return Field(default, description=help_, json_schema_extra=extra, **rules)


class Settings(BaseModel):
    """The options of ``segment`` and ``plan``; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    channel: Text | None = _option(
        SOURCE,
        None,
        "Channel to segment, by name or index; needed if the source has several.",
        "NAME|INDEX",
        result=True,
    )
    time: TimeRange | None = _option(
        SOURCE, None, "Timepoints to segment, half-open: 0:10, 5: or 7. (default: all)", "A:B", result=True
    )
    level: int = _option(SOURCE, 0, "Resolution level to segment; 0 is the finest.", "N", result=True, ge=0)
    nan_to_background: bool = _option(
        SOURCE, False, "Treat NaN and infinite voxels as background, not as an error.", result=True
    )
    normalization: MeanStd | None = _option(
        SOURCE,
        None,
        "Mean and standard deviation to normalise with, or those of a coarser level, which is read faster. "
        "(default: of all voxels of each volume)",
        "MEAN,STD|level:N",
        result=True,
    )
    model: Text = _option(
        NETWORK, "MegaSeg_v1", "Name of a model, or path of a bundle folder, zip or .ckpt.", "NAME|PATH"
    )
    patch: Triple | None = _option(
        NETWORK,
        None,
        "Voxels that the network sees at once. (default: the bundle's, else 64,128,128)",
        "Z,Y,X",
        result=True,
    )
    overlap: Fractions | None = _option(
        NETWORK,
        None,
        "Overlap of patches, once or per axis; 0 is fastest. (default: the bundle's, else 0.25)",
        "F",
        result=True,
    )
    engine: Literal["auto", "torch"] = _option(NETWORK, "auto", "What runs the network.", "auto|torch", result=True)
    device: Literal["auto", "cpu", "cuda"] = _option(
        NETWORK, "auto", "Where the network runs; auto is a GPU if there is one.", "auto|cpu|cuda", result=True
    )
    precision: Literal["auto", "fp32"] = _option(
        NETWORK, "auto", "Arithmetic inside the network; fp32 has TF32 off.", "auto|fp32", result=True
    )
    batch: int | None = _option(NETWORK, None, "Patches per forward pass. (default: 1)", "N", result=True, gt=0)
    threads: int | None = _option(
        NETWORK,
        None,
        "CPU threads of one forward pass; part of the result's last bits. (default: the cores of this machine)",
        "N",
        result=True,
        gt=0,
    )
    outputs: Names = _option(
        OUTPUT, ("labels", "scores"), "What to write, of labels, scores and mask.", "LIST", result=True
    )
    threshold: Threshold = _option(
        OUTPUT,
        0.5,
        "A voxel is foreground if its score is above this; or a method that finds the threshold of each volume.",
        f"F|{'|'.join(THRESHOLDS)}",
        result=True,
    )
    connectivity: Annotated[Literal[1, 2, 3], BeforeValidator(_parse_whole)] = _option(
        OUTPUT, 1, "Voxels of one object touch by faces (1), edges (2) or corners (3).", "1|2|3", result=True
    )
    min_size: int = _option(OUTPUT, 0, "Drop objects of fewer voxels.", "N", result=True, ge=0)
    fill_holes: int = _option(
        OUTPUT,
        0,
        "Fill holes of at most this many voxels: background connected as --connectivity says.",
        "N",
        result=True,
        ge=0,
    )
    scores_dtype: Literal["uint8", "float32"] = _option(
        OUTPUT, "uint8", "uint8 stores 255 times the score, rounded.", "uint8|float32", result=True
    )
    label_name: Text = _option(OUTPUT, "megaseg", "Name of the label image.", "NAME", result=True)
    ome_zarr: Annotated[Literal["0.4", "0.5"], BeforeValidator(_parse_text)] = _option(
        OUTPUT, "0.5", "OME-Zarr version to write.", "0.4|0.5", result=True
    )
    overwrite: bool = _option(OUTPUT, False, "Start anew where another run's output stands.")
    block: Triple | None = _option(
        RUN,
        None,
        "Voxels of one task; any shape gives the same result. (default: from --memory)",
        "Z,Y,X",
        result=True,
    )
    memory: Bytes | None = _option(
        RUN,
        None,
        "Memory of one worker. (default: 8GB, or its share of this machine if that is less)",
        "8GB|500MiB",
    )
    workers: int | None = _option(RUN, None, "Worker processes. (default: one, or one per GPU)", "N", gt=0)
    scheduler: Text | None = _option(RUN, None, "Use the running Dask scheduler at this address.", "ADDRESS")
    endpoint: Text | None = _option(
        RUN, None, "Address of an S3-compatible server, or of another cloud's. (default: AWS_ENDPOINT_URL)", "URL"
    )
    anon: bool = _option(RUN, False, "Read SOURCE without credentials.")
    storage_option: Names | None = _option(
        RUN,
        None,
        "Options of the object store, such as region=us-west-2, separated by commas. Secrets belong in the "
        "environment.",
        "K=V",
    )
    retries: int = _option(RUN, 3, "Further attempts for a task whose worker or store failed.", "N", ge=0)
    timeout: float | None = _option(
        RUN,
        None,
        "Give up a task or a worker that shows no sign for so many seconds, and try elsewhere. "
        "(default: a worker after 120, a task after 20 times the longest of its stage, 300 at least)",
        "SECONDS",
        gt=0,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts True as 1, and ``patch=True`` would become 1,1,1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected a value, not true or false")
        return value

    @field_validator("label_name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        # It becomes a folder beside zarr's own files.
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) or name == "zarr.json":
            raise ValueError("expected letters, digits, _, - and dots inside, 100 at most: it names a folder")
        return name

    @field_validator("label_name")
    @classmethod
    def _no_mask(cls, name: str) -> str:
        if name.endswith("_mask"):
            raise ValueError("the ending _mask is taken by --outputs mask")
        return name

    @field_validator("outputs")
    @classmethod
    def _known_outputs(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(outputs) - set(OUTPUTS):
            raise ValueError(f"unknown {', '.join(map(repr, sorted(unknown)))}; choose from {', '.join(OUTPUTS)}")
        if not outputs:
            raise ValueError(f"nothing to write; choose from {', '.join(OUTPUTS)}")
        return tuple(name for name in OUTPUTS if name in outputs)

    def recorded(self) -> "Settings":
        """Return these settings as a run may write them down: without what may be secret."""
        return self.model_copy(update={"storage_option": None})

    @property
    def is_automatic(self) -> bool:
        """Tell whether each volume gets a threshold of its own, found from all of it."""
        return isinstance(self.threshold, str)

    def result_options(self) -> dict[str, object]:
        """Return the options that can change the output, as JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if is_result(k)}

    def filled(self, values: Mapping[str, object]) -> "Settings":
        """Return these settings with what is left open (``None`` or ``auto``) taken from ``values``."""
        open_ = {k: v for k, v in values.items() if getattr(self, k) in (None, "auto")}
        return Settings.model_validate({**self.model_dump(), **open_})


def declared(name: str) -> dict[str, Any]:
    """Return ``panel``, ``metavar`` and ``result`` of an option."""
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return extra


def is_result(name: str) -> bool:
    """Tell whether an option can change the output."""
    return bool(declared(name)["result"])


def parse_settings(values: Mapping[str, object]) -> Settings:
    """Validate options given as text or as Python values.

    Raises :class:`SettingsError` that names the option, its value and what it takes.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            raise SettingsError(f"no such option: {name}{_nearest(name)}") from error
        message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
        takes = declared(name)["metavar"] or "true|false"
        option = f"--{name.replace('_', '-')}"
        raise SettingsError(f"{option} {_shown(values.get(name))}: {message} (takes {takes})") from error


def _nearest(name: str) -> str:
    found = get_close_matches(name.replace("-", "_"), Settings.model_fields, n=1)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(Settings.model_fields)}"


def _shown(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    # Quoted where it would vanish from the line, or break it.
    return text if text and text.isprintable() else repr(text)


def options_table() -> str:
    """Return all options as a Markdown table: what docs/options.md holds."""
    rows = ["| option | meaning |", "|---|---|"]
    for name, field in Settings.model_fields.items():
        metavar = declared(name)["metavar"]
        option = f"--{name.replace('_', '-')}" + (f" {metavar}" if metavar else "")
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        stated = "" if default in (None, False) else f" Default: {default}."
        rows.append(f"| `{option.replace('|', chr(92) + '|')}` | {field.description}{stated} |")
    return "\n".join(rows)

"""Every option of a run, declared once.

The command line, the keywords of :func:`megaseg_dask.segment` and the table in
the docs are made from this class. A field marked ``result`` can change the
output, and so belongs to the fingerprint of a plan; the others only say how
and where the work is done, and may differ when a run resumes.
"""

import re
from collections.abc import Mapping
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

from megaseg_dask.algorithms.threshold_methods import METHODS
from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine_names import EngineName
from megaseg_dask.messages import closest, validation_message
from megaseg_dask.ngff.versions import LATEST, VERSIONS, VersionName
from megaseg_dask.plan.parsing import (
    parse_bytes,
    parse_models,
    parse_names,
    parse_normalization,
    parse_patch,
    parse_roi,
    parse_text,
    parse_three,
    parse_threshold,
    parse_time,
    parse_whole,
    require_box,
    require_range,
)

OUTPUTS = ("labels", "scores", "mask", "measurements")

# Headings of the command line's help.
SOURCE = "What to segment"
NETWORK = "The network"
OUTPUT = "What to write"
RUN = "Where and how it runs"

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Patch = Annotated[
    tuple[Positive, Positive, Positive] | Literal["auto"], BeforeValidator(parse_patch)
]
Triple = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(parse_three)]
Fractions = Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(parse_three)]
Bytes = Annotated[Positive, BeforeValidator(parse_bytes)]
Names = Annotated[tuple[str, ...], BeforeValidator(parse_names)]
TimeRange = Annotated[
    tuple[int, int | None], BeforeValidator(parse_time), AfterValidator(require_range)
]
Text = Annotated[str, BeforeValidator(parse_text)]
Models = Annotated[tuple[str, ...], BeforeValidator(parse_models)]
Range = tuple[int, int]
Roi = Annotated[tuple[Range, Range, Range], BeforeValidator(parse_roi), AfterValidator(require_box)]
Threshold = Annotated[float | str, BeforeValidator(parse_threshold)]
MeanStd = Annotated[tuple[float, float] | str, BeforeValidator(parse_normalization)]


def _option(
    panel: str,
    default: Any,
    help_: str,
    metavar: str | None = None,
    *,
    result: bool = False,
    **rules: Any,
) -> Any:
    extra: dict[str, Any] = {"panel": panel, "metavar": metavar, "result": result}
    return Field(default, description=help_, json_schema_extra=extra, **rules)


class Settings(BaseModel):
    """The options of ``segment`` and ``plan``; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    channel: Text | None = _option(
        SOURCE,
        None,
        "Channel to segment, by name or index, or several separated by commas; needed if the source has several.",
        "NAME|INDEX",
        result=True,
    )
    time: TimeRange | None = _option(
        SOURCE,
        None,
        "Timepoints to segment, half-open: 0:10, 5: or 7. (default: all)",
        "A:B",
        result=True,
    )
    level: int = _option(
        SOURCE, 0, "Resolution level to segment; 0 is the finest.", "N", result=True, ge=0
    )
    roi: Roi | None = _option(
        SOURCE,
        None,
        "Segment only this region; its voxels are those that the whole volume would have got.",
        "z0:z1,y0:y1,x0:x1",
        result=True,
    )
    wells: Text | None = _option(
        SOURCE, None, "Wells of a plate: A/1,B/* for instance. (default: all)", "LIST"
    )
    fields: Text | None = _option(
        SOURCE, None, "Fields of each well, by name or index. (default: all)", "LIST"
    )
    acquisition: int | None = _option(
        SOURCE, None, "Acquisition of a plate, by its id. (default: all)", "ID", ge=0
    )
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
    model: Models = _option(
        NETWORK,
        ("MegaSeg_v1",),
        "Name of a model, or path of a bundle folder, zip or .ckpt. Repeated: the mean of the logits of all.",
        "NAME|PATH",
        min_length=1,
    )
    checkpoint: Text | None = _option(
        NETWORK,
        None,
        "Which of the bundle's checkpoints. (default: that of the highest epoch)",
        "FILE",
    )
    tta: bool = _option(
        NETWORK,
        False,
        "Average the logits of each patch and its mirror images, 8 in all: a little better, 8 times slower.",
        result=True,
    )
    patch: Patch | None = _option(
        NETWORK,
        None,
        "Voxels that the network sees at once; auto is the cheapest near the bundle's. (default: the bundle's, else "
        "64,128,128)",
        "Z,Y,X|auto",
        result=True,
    )
    overlap: Fractions | None = _option(
        NETWORK,
        None,
        "Overlap of patches, once or per axis; 0 is fastest. (default: the bundle's, else 0.25)",
        "F",
        result=True,
    )
    engine: Literal["auto", EngineName] = _option(
        NETWORK,
        "auto",
        "What runs the network; auto is torch on a GPU, and on a CPU openvino if it is installed.",
        "auto|torch|openvino",
        result=True,
    )
    device: Literal["auto", "cpu", "cuda"] = _option(
        NETWORK,
        "auto",
        "Where the network runs; auto is a GPU if there is one.",
        "auto|cpu|cuda",
        result=True,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _option(
        NETWORK,
        "auto",
        "Arithmetic inside the network; auto is fp32 on a CPU and fp16 on a GPU. fp32 has TF32 off.",
        "auto|fp32|bf16|fp16",
        result=True,
    )
    batch: int | None = _option(
        NETWORK,
        None,
        "Patches per forward pass. (default: 1; on a GPU the quickest, measured when the run is planned)",
        "N",
        result=True,
        gt=0,
    )
    threads: int | None = _option(
        NETWORK,
        None,
        "CPU threads of one forward pass; part of the result's last bits. (default: the cores of this machine)",
        "N",
        result=True,
        gt=0,
    )
    outputs: Names = _option(
        OUTPUT,
        ("labels", "scores"),
        "What to write, of labels, scores, mask and measurements.",
        "LIST",
        result=True,
    )
    threshold: Threshold = _option(
        OUTPUT,
        0.5,
        "A voxel is foreground if its score is above this; or a method that finds the threshold of each volume, on "
        "the scale of its logits, which are the scores before the sigmoid.",
        f"F|{'|'.join(METHODS)}",
        result=True,
    )
    connectivity: Annotated[Literal[1, 2, 3], BeforeValidator(parse_whole)] = _option(
        OUTPUT,
        1,
        "Voxels of one object touch by faces (1), edges (2) or corners (3).",
        "1|2|3",
        result=True,
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
    ome_zarr: Annotated[VersionName, BeforeValidator(parse_text)] = _option(
        OUTPUT, LATEST, "OME-Zarr version to write.", "|".join(VERSIONS), result=True
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
    workers: int | None = _option(
        RUN,
        None,
        "Worker processes; 0 runs all in this process. (default: one, or one per GPU)",
        "N",
        ge=0,
    )
    scheduler: Text | None = _option(
        RUN, None, "Use the running Dask scheduler at this address.", "ADDRESS"
    )
    cluster: Text | None = _option(
        RUN,
        None,
        "Start workers as this file says: by SLURM, PBS, LSF, SGE or Kubernetes for instance.",
        "FILE.yaml",
    )
    endpoint: Text | None = _option(
        RUN,
        None,
        "Address of an S3-compatible server, or of another cloud's. (default: AWS_ENDPOINT_URL)",
        "URL",
    )
    anon: bool = _option(RUN, False, "Read SOURCE without credentials.")
    storage_option: Names | None = _option(
        RUN,
        None,
        "Options of the object store, such as region=us-west-2, separated by commas. Secrets belong in the "
        "environment.",
        "K=V",
    )
    retries: int = _option(
        RUN, 3, "Further attempts for a task whose worker or store failed.", "N", ge=0
    )
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
        if (
            isinstance(value, bool)
            and cls.model_fields[str(info.field_name)].annotation is not bool
        ):
            raise ValueError("expected a value, not true or false")
        return value

    @field_validator("label_name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        # It becomes a folder beside zarr's own files.
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) or name == "zarr.json":
            raise ValueError(
                "expected letters, digits, _, - and dots inside, 100 at most: it names a folder"
            )
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
            raise ValueError(
                f"unknown {', '.join(map(repr, sorted(unknown)))}; choose from {', '.join(OUTPUTS)}"
            )
        if not outputs:
            raise ValueError(f"nothing to write; choose from {', '.join(OUTPUTS)}")
        if "measurements" in outputs and "labels" not in outputs:
            raise ValueError("measurements are of labels, which have to be written too")
        return tuple(name for name in OUTPUTS if name in outputs)

    def recorded(self) -> "Settings":
        """Return these settings as a run may write them down: without what may be secret."""
        return self.model_copy(update={"storage_option": None})

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
        message = validation_message(problem)
        takes = declared(name)["metavar"] or "true|false"
        option = f"--{name.replace('_', '-')}"
        raise SettingsError(
            f"{option} {_shown(values.get(name))}: {message} (takes {takes})"
        ) from error


def _nearest(name: str) -> str:
    found = closest(name.replace("-", "_"), Settings.model_fields)
    return (
        f"; did you mean {found}?" if found else f"; there are {', '.join(Settings.model_fields)}"
    )


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

"""Every option of a run, declared once.

The command line, the keywords of :func:`megaseg_dask.segment` and the table in
the docs are made from this class. An option that changes the result is part of
the fingerprint of a plan. The others only say how and where the work is done,
and may differ when a run resumes.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from megaseg_dask.algorithms.threshold_methods import METHODS
from megaseg_dask.errors import SettingsError
from megaseg_dask.inference.engine_names import EngineName
from megaseg_dask.messages import nearest, validation_message
from megaseg_dask.ngff.versions import LATEST, VERSIONS
from megaseg_dask.plan.option_types import (
    Bytes,
    Connectivity,
    Distance,
    Fractions,
    MeanStd,
    Models,
    Names,
    Natural,
    Patch,
    Positive,
    PositiveFloat,
    Roi,
    Text,
    Threshold,
    Times,
    Triple,
    Version,
    VoxelSize,
    Wait,
)

OUTPUTS = ("labels", "scores", "mask", "measurements")
ALL_CHANNELS = "all"

# Headings of the command line's help.
SOURCE = "What to segment"
NETWORK = "The network"
OUTPUT = "What to write"
RUN = "Where and how it runs"

# A label image is a folder beside zarr's own files.
_LABEL_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Option:
    """How an option is shown: its heading, its help, and the form of its value if it takes one."""

    panel: str
    help: str
    metavar: str | None = None
    changes_result: bool = False


class Settings(BaseModel):
    """The options of ``segment`` and ``plan``; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    channel: Annotated[
        Text | None,
        Option(
            SOURCE,
            "Channel to segment: its name, its index or index:N. Separate several by commas. "
            "Needed if the source has several.",
            "NAME|INDEX",
            changes_result=True,
        ),
    ] = None
    time: Annotated[
        Times | None,
        Option(
            SOURCE,
            "Timepoints to segment, such as 0:10 (0 to 9), 5: (5 to the last) or 7. (default: all)",
            "A:B",
            changes_result=True,
        ),
    ] = None
    level: Annotated[
        Natural,
        Option(
            SOURCE,
            "Resolution level to segment; 0 is the finest.",
            "N",
            changes_result=True,
        ),
    ] = 0
    roi: Annotated[
        Roi | None,
        Option(
            SOURCE,
            "Segment only this region; its scores are the same as in the whole volume.",
            "z0:z1,y0:y1,x0:x1",
            changes_result=True,
        ),
    ] = None
    voxel_size: Annotated[
        VoxelSize,
        Option(
            SOURCE,
            "Size of the voxels that the network gets, in µm: source is that of the image, model "
            "that of the model's training images; or give three numbers. The image is resampled. "
            "Scores and labels have the voxels of the source.",
            "source|model|Z,Y,X",
            changes_result=True,
        ),
    ] = "source"
    where: Annotated[
        Text | None,
        Option(
            SOURCE,
            "Predict only inside a mask: the name of a label image of the source, or the path of "
            "another one. With data, predict only where the source has chunks. The rest becomes "
            "background. (default: everywhere)",
            "LABELS|data",
            changes_result=True,
        ),
    ] = None
    where_margin: Annotated[
        Distance,
        Option(
            SOURCE,
            "Also predict voxels up to this distance from the mask, in µm.",
            "UM",
            changes_result=True,
        ),
    ] = 0.0
    unmarked: Annotated[
        bool,
        Option(
            SOURCE,
            "Take the images of --where and --regions as label images, even if their metadata do "
            "not say so.",
        ),
    ] = False
    wells: Annotated[
        Text | None,
        Option(
            SOURCE,
            "Wells of a plate, such as A/1,B/*. (default: all)",
            "LIST",
        ),
    ] = None
    fields: Annotated[
        Text | None,
        Option(
            SOURCE,
            "Fields of each well, by name or index. (default: all)",
            "LIST",
        ),
    ] = None
    acquisition: Annotated[
        Natural | None,
        Option(
            SOURCE,
            "Acquisition of a plate, by its id. (default: all)",
            "ID",
        ),
    ] = None
    nan_to_background: Annotated[
        bool,
        Option(
            SOURCE,
            "Treat NaN and infinite voxels as background, not as an error.",
            changes_result=True,
        ),
    ] = False
    missing_chunks: Annotated[
        Literal["fill", "error"],
        Option(
            SOURCE,
            "What to do if the source lacks a chunk: fill takes the fill value of the array and "
            "counts the chunk; error reports an error. A volume without any chunk is always an "
            "error.",
            "fill|error",
            changes_result=True,
        ),
    ] = "fill"
    normalization: Annotated[
        MeanStd | None,
        Option(
            SOURCE,
            "Mean and standard deviation for the normalization. level:N measures them in a coarser "
            "level, which is faster. series measures them once for all timepoints of a field. "
            "well, acquisition and plate measure them once for all fields of a well, an "
            "acquisition or the plate. (default: measured in all voxels of each volume)",
            "MEAN,STD|level:N|series|well|acquisition|plate",
            changes_result=True,
        ),
    ] = None
    model: Annotated[
        Models,
        Option(
            NETWORK,
            "Name of a model, or path of a bundle folder, zip or .ckpt. Repeat the option to "
            "average the logits of several models.",
            "NAME|PATH",
        ),
    ] = ("MegaSeg_v1",)
    checkpoint: Annotated[
        Text | None,
        Option(
            NETWORK,
            "Checkpoint of the bundle to use. (default: the best one, or that of the highest "
            "epoch)",
            "FILE",
        ),
    ] = None
    tta: Annotated[
        bool,
        Option(
            NETWORK,
            "Average the logits of each patch and its 7 mirror images. The result is a little "
            "better and takes 8 times longer.",
            changes_result=True,
        ),
    ] = False
    patch: Annotated[
        Patch | None,
        Option(
            NETWORK,
            "Size of the network's input in voxels; auto is the fastest size near that of the "
            "bundle. (default: that of the bundle, else 64,128,128)",
            "Z,Y,X|auto",
            changes_result=True,
        ),
    ] = None
    overlap: Annotated[
        Fractions | None,
        Option(
            NETWORK,
            "Overlap of patches, from 0 to below 1: one number, or one for each axis. 0 is "
            "fastest. (default: that of the bundle, else 0.25)",
            "F",
            changes_result=True,
        ),
    ] = None
    engine: Annotated[
        Literal["auto", EngineName],
        Option(
            NETWORK,
            "Library that runs the network; auto is torch on a GPU, and on a CPU openvino if it is "
            "installed.",
            "auto|torch|openvino",
            changes_result=True,
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Option(
            NETWORK,
            "Device that runs the network; auto is a GPU if there is one.",
            "auto|cpu|cuda",
            changes_result=True,
        ),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Option(
            NETWORK,
            "Number format inside the network. auto is fp16 on a GPU. On the CPUs of this machine "
            "it is bf16 if that makes a long run at least 1.3 times as fast. Otherwise, or if a "
            "test on your image fails, it is fp32. fp32 does not use TF32.",
            "auto|fp32|bf16|fp16",
            changes_result=True,
        ),
    ] = "auto"
    batch: Annotated[
        Positive | None,
        Option(
            NETWORK,
            "Patches per forward pass. (default: 1; on a GPU the fastest number, measured when "
            "the run is planned)",
            "N",
            changes_result=True,
        ),
    ] = None
    threads: Annotated[
        Positive | None,
        Option(
            NETWORK,
            "CPU threads of one forward pass; they can change the last bits of scores. (default: "
            "the cores of this machine)",
            "N",
            changes_result=True,
        ),
    ] = None
    outputs: Annotated[
        Names,
        Option(
            OUTPUT,
            "Outputs to write: any of labels, scores, mask and measurements.",
            "LIST",
            changes_result=True,
        ),
    ] = ("labels", "scores")
    measure_channels: Annotated[
        Text | None,
        Option(
            OUTPUT,
            "Other channels in which to measure intensities: all, or names and indices as for "
            "--channel. The names of their columns end in the name of the channel.",
            "all|LIST",
            changes_result=True,
        ),
    ] = None
    regions: Annotated[
        Text | None,
        Option(
            OUTPUT,
            "Label image of regions, such as cells: the name of a label image of the source, or "
            "the path of another one with the same voxels. Measurements then say in which region "
            "an object lies, and a table of regions is written.",
            "LABELS",
            changes_result=True,
        ),
    ] = None
    table: Annotated[
        Literal["parquet", "csv"],
        Option(
            OUTPUT,
            "File format of the table beside TARGET, with --outputs measurements.",
            "parquet|csv",
            changes_result=True,
        ),
    ] = "parquet"
    threshold: Annotated[
        Threshold,
        Option(
            OUTPUT,
            "A voxel is foreground if its score is above this number. A method finds the "
            "threshold of each volume from its logits, which are the scores before "
            "the sigmoid.",
            f"F|{'|'.join(METHODS)}",
            changes_result=True,
        ),
    ] = 0.5
    connectivity: Annotated[
        Connectivity,
        Option(
            OUTPUT,
            "Voxels of one object touch by faces (1), also by edges (2), or also by corners (3).",
            "1|2|3",
            changes_result=True,
        ),
    ] = 1
    min_size: Annotated[
        Natural,
        Option(
            OUTPUT,
            "Remove objects with fewer voxels than this.",
            "N",
            changes_result=True,
        ),
    ] = 0
    fill_holes: Annotated[
        Natural,
        Option(
            OUTPUT,
            "Fill holes of at most this many voxels. --connectivity also says which voxels of a "
            "hole touch.",
            "N",
            changes_result=True,
        ),
    ] = 0
    split: Annotated[
        Literal["none", "distance"],
        Option(
            OUTPUT,
            "Split objects that touch. distance splits them at narrow places, between the peaks "
            "of the distance from their surface.",
            "none|distance",
            changes_result=True,
        ),
    ] = "none"
    split_depth: Annotated[
        PositiveFloat | None,
        Option(
            OUTPUT,
            "An object is split between two peaks if the distance falls by at least this much "
            "between them, in µm. A larger value splits fewer objects. (default: 0.75)",
            "UM",
            changes_result=True,
        ),
    ] = None
    scores_dtype: Annotated[
        Literal["uint8", "float32"],
        Option(
            OUTPUT,
            "Type of the scores; uint8 stores 255 times the score, rounded.",
            "uint8|float32",
            changes_result=True,
        ),
    ] = "uint8"
    keep_logits: Annotated[
        bool,
        Option(
            OUTPUT,
            "Keep the logits, 4 bytes a voxel, in the run folder: megaseg relabel then also finds "
            "automatic thresholds.",
            changes_result=True,
        ),
    ] = False
    label_name: Annotated[
        Text,
        Option(
            OUTPUT,
            "Name of the label image.",
            "NAME",
            changes_result=True,
        ),
    ] = "megaseg"
    ome_zarr: Annotated[
        Version,
        Option(
            OUTPUT,
            "OME-Zarr version to write.",
            "|".join(VERSIONS),
            changes_result=True,
        ),
    ] = LATEST
    overwrite: Annotated[
        bool,
        Option(
            OUTPUT,
            "Replace the output of an earlier run at TARGET.",
        ),
    ] = False
    follow: Annotated[
        bool,
        Option(
            RUN,
            "Segment while another program writes SOURCE: segment and publish each timepoint and "
            "field when it is complete. The run ends when everything that the metadata list is "
            "done, at the end of --time, after --follow-timeout, or at Ctrl-C.",
        ),
    ] = False
    follow_timeout: Annotated[
        Wait | None,
        Option(
            RUN,
            "With --follow, end the run if SOURCE has not changed for this long, such as 90, 30m "
            "or 2h. "
            "(default: never)",
            "TIME",
        ),
    ] = None
    settle: Annotated[
        Wait | None,
        Option(
            RUN,
            "With --follow, segment a timepoint only if none of its chunks has changed for this "
            "long. Use it if chunks are written more than once, or if empty chunks are never "
            "written. "
            "(default: 1 s on a disk, 0 in an object store, 10 s if a chunk or shard holds "
            "several timepoints)",
            "TIME",
        ),
    ] = None
    on_volume: Annotated[
        Text | None,
        Option(
            RUN,
            "Run this command for each finished volume, with JSON about the volume on its stdin. "
            "If the command fails, a warning is shown.",
            "COMMAND",
        ),
    ] = None
    block: Annotated[
        Triple | None,
        Option(
            RUN,
            "Size of one task in voxels; any size gives the same result. (default: from --memory)",
            "Z,Y,X",
            changes_result=True,
        ),
    ] = None
    memory: Annotated[
        Bytes | None,
        Option(
            RUN,
            "Memory that one worker may use. (default: 8GB, or the worker's share of this machine "
            "if that is less)",
            "8GB|500MiB",
        ),
    ] = None
    workers: Annotated[
        Natural | None,
        Option(
            RUN,
            "Number of worker processes; 0 runs everything in this process. (default: 1, or one "
            "per GPU)",
            "N",
        ),
    ] = None
    scheduler: Annotated[
        Text | None,
        Option(
            RUN,
            "Use the running Dask scheduler at this address.",
            "ADDRESS",
        ),
    ] = None
    cluster: Annotated[
        Text | None,
        Option(
            RUN,
            "Start workers with this cluster file, on SLURM, PBS, LSF, SGE or Kubernetes for "
            "example.",
            "FILE.yaml",
        ),
    ] = None
    endpoint: Annotated[
        Text | None,
        Option(
            RUN,
            "Address of an S3-compatible server, or of a server of another cloud. (default: "
            "AWS_ENDPOINT_URL)",
            "URL",
        ),
    ] = None
    anon: Annotated[
        bool,
        Option(
            RUN,
            "Read SOURCE without credentials.",
        ),
    ] = False
    storage_option: Annotated[
        Names | None,
        Option(
            RUN,
            "Options of the object store, such as region=us-west-2, separated by commas. Secrets "
            "belong in the environment.",
            "K=V",
        ),
    ] = None
    retries: Annotated[
        Natural,
        Option(
            RUN,
            "How often to retry a failed request to a store, and a task whose worker or "
            "store failed.",
            "N",
        ),
    ] = 3
    timeout: Annotated[
        PositiveFloat | None,
        Option(
            RUN,
            "If a task or a worker does not respond for this many seconds, run the task again on "
            "another worker. (default: 120 for a worker; for a task, 20 times the longest task of "
            "its stage, at least 300)",
            "SECONDS",
        ),
    ] = None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: object, info: ValidationInfo) -> object:
        # Python counts True as 1, and ``patch=True`` would become 1,1,1.
        is_flag = cls.model_fields[str(info.field_name)].annotation is bool
        if isinstance(value, bool) and not is_flag:
            raise ValueError("expected a value, found true or false")
        return value

    @field_validator("label_name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not _LABEL_NAME.fullmatch(name) or name == "zarr.json":
            raise ValueError(
                "expected at most 100 letters, digits, _, - and inner dots, because it names a "
                "folder"
            )
        if name.endswith("_mask"):
            raise ValueError("the ending _mask is reserved for --outputs mask")
        return name

    @field_validator("outputs")
    @classmethod
    def _known_outputs(cls, outputs: tuple[str, ...]) -> tuple[str, ...]:
        choices = ", ".join(OUTPUTS)
        unknown = sorted(set(outputs) - set(OUTPUTS))
        if unknown:
            raise ValueError(f"unknown {', '.join(map(repr, unknown))}; choose from {choices}")
        if not outputs:
            raise ValueError(f"expected one or more of {choices}")
        if "measurements" in outputs and "labels" not in outputs:
            raise ValueError("measurements need labels; add labels to --outputs")
        return tuple(name for name in OUTPUTS if name in outputs)

    @field_validator("measure_channels", "regions")
    @classmethod
    def _of_measurements(cls, value: str | None, info: ValidationInfo) -> str | None:
        # Outputs that are wrong are told first.
        if value is not None and "measurements" not in info.data.get("outputs", OUTPUTS):
            raise ValueError("it needs measurements; add measurements to --outputs")
        return value

    @field_validator("follow_timeout", "settle")
    @classmethod
    def _of_following(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and not info.data.get("follow"):
            raise ValueError("it needs --follow; add --follow, or omit this option")
        return value

    @field_validator("on_volume")
    @classmethod
    def _is_command(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"expected a command, as for a shell ({error})") from None
        if not words:
            raise ValueError("expected a command, found none")
        return value

    def recorded(self) -> "Settings":
        """Return these settings without those that may be secret, as a run records them."""
        return self.model_copy(update={"storage_option": None, "on_volume": None})

    def filled(self, values: Mapping[str, object]) -> "Settings":
        """Return these settings with open ones, ``None`` or ``auto``, taken from ``values``."""
        filled = self.model_dump()
        for name, value in values.items():
            if filled[name] in (None, "auto"):
                filled[name] = value
        return Settings.model_validate(filled)


def declared(name: str) -> Option:
    """Return the declaration of an option."""
    options = [each for each in Settings.model_fields[name].metadata if isinstance(each, Option)]
    return options[0]


def option_text(name: str) -> str:
    """Return an option as people type it: ``--label-name`` for ``label_name``."""
    return f"--{name.replace('_', '-')}"


def parse_settings(values: Mapping[str, object]) -> Settings:
    """Validate options given as text or as Python values.

    Raises:
        SettingsError: One is unknown, or has a value that it does not take.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            advice = nearest(name.replace("-", "_"), Settings.model_fields)
            raise SettingsError(f"unknown option {name}{advice}") from error
        message = validation_message(problem)
        raise SettingsError(
            f"{option_text(name)} {_value_text(values.get(name))}: {message}"
        ) from error


def _value_text(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
    # Quoted where it would vanish from the line, or break it.
    return text if text and text.isprintable() else repr(text)


def options_table() -> str:
    """Return all options as a Markdown table: the content of docs/options.md."""
    rows = ["| option | meaning |", "|---|---|"]
    for name, field in Settings.model_fields.items():
        option = declared(name)
        words = f"{option_text(name)} {option.metavar or ''}".strip().replace("|", "\\|")
        rows.append(f"| `{words}` | {option.help}{_default_text(field.default)} |")
    return "\n".join(rows)


def _default_text(default: object) -> str:
    if default is None or default is False:
        return ""
    text = ",".join(default) if isinstance(default, tuple) else default
    return f" Default: {text}."

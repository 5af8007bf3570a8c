"""The transforms of a prediction as steps with numbers; one that is no step is refused by name."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.models.bundle import Preprocessing, Step
from megaseg_dask.models.cytodl.config import (
    CYTODL_PACKAGES,
    Accepted,
    Section,
    Source,
    Statement,
    class_name,
    is_same,
    reference_origin,
    require_accepted,
)
from megaseg_dask.models.cytodl.safe_loading import short

# Where cyto-dl's data modules keep the transforms of a prediction; and those of training, of which
# only what normalizes an image says something about prediction.
PREDICT = (
    "data.transforms.predict.transforms",
    "data.transforms.predict",
    "data.transforms.transforms",
    "data.transforms",
    "data.predict_dataloaders.transforms",
    "data.predict_dataloaders.dataset.transform",
)
TRAIN = (
    "data.transforms.test.transforms",
    "data.transforms.valid.transforms",
    "data.transforms.train.transforms",
    "data.train_dataloaders.transforms",
    "data.train_dataloaders.dataset.transform",
)
PACKAGES = ("monai.transforms", *CYTODL_PACKAGES)
MAX_TRANSFORMS = 100

# Transforms that load an image or change its container, not its values.
NO_STEPS = {
    "RemoveNaNKeys",
    "LoadImage",
    "BioIOImageLoader",
    "AICSImageLoader",
    "EnsureChannelFirst",
    "ToTensor",
    "EnsureType",
    "CastToType",
    "SelectItems",
    "DeleteItems",
}
# Transforms that normalize by something that no run takes of a volume.
NEEDS = {
    "ScaleIntensityRangePercentiles": "percentiles of the volume",
    "ClipIntensityPercentiles": "percentiles of the volume",
    "Clip": "percentiles of the volume",
    "ScaleIntensity": "minimum and maximum of the volume",
    "HistogramNormalize": "the volume's histogram",
}
WIDE = (
    "float32",
    "numpy.float32",
    "torch.float32",
    "float64",
    "numpy.float64",
    "torch.float64",
    "float",
)
HALF = ("float16", "numpy.float16", "torch.float16", "bfloat16", "torch.bfloat16")
NORMALIZE: Accepted = {"nonzero": (False,), "dtype": WIDE}
RESCALE: Accepted = {"dtype": WIDE, "clip": (False, True)}
RESCALE_NUMBERS = ("a_min", "a_max", "b_min", "b_max")
ANYWHERE = {"_target_", "keys", "allow_missing_keys"}


def read_preprocessing(config: Source, n_channels: int) -> tuple[Preprocessing, str]:
    """Return the steps that the predict transforms of a configuration ask for, and their origin.

    Without predict transforms, the normalization in training is taken.

    Raises:
        BundleError: A transform is no step, its arguments are not known, or they are not a list.
    """
    path = _find_list(config, PREDICT + TRAIN)
    is_predict = path in PREDICT
    if not is_predict:
        _require_no_transforms(config)
    if path is None:
        return Preprocessing(), reference_origin([(config, path) for path in PREDICT])
    transforms = config.at(path)
    assert isinstance(transforms, list)
    origin = f"{config.name}: {path}"
    if len(transforms) > MAX_TRANSFORMS:
        raise BundleError(
            f"{origin} has {len(transforms)} transforms; at most {MAX_TRANSFORMS} are read"
        )
    steps: list[Step] = []
    for number in range(len(transforms)):
        transform = _Transform(config, f"{path}.{number}", n_channels)
        if transform.is_for_image and (is_predict or transform.normalizes):
            steps += transform.steps(is_normalized=bool(steps))
    return Preprocessing(tuple(steps)), origin


def _find_list(config: Source, paths: tuple[str, ...]) -> str | None:
    for path in paths:
        if isinstance(config.at(path), list):
            return path
    return None


def _require_no_transforms(config: Source) -> None:
    """Check that where predict transforms are expected there is nothing at all.

    Anything but a list there is a mistake, and must not be taken for none.
    """
    for list_path in PREDICT:
        keys = list_path.split(".")
        for end in range(1, len(keys) + 1):
            path = ".".join(keys[:end])
            statement = config.statement(path)
            # A list that would have to be computed is told of, with the reference's in its place.
            if statement is None or config.unresolved(f"{path}.transforms"):
                break
            is_list_path = end == len(keys)
            # `data.transforms` may hold the lists of the stages by name, instead of one list.
            holds_stages = path == "data.transforms" and not config.mentions(path, "_target_")
            may_be_section = not is_list_path or holds_stages
            if not may_be_section or not isinstance(statement.value, Mapping):
                expected = "a list of transforms" if is_list_path else "a section"
                raise BundleError(f"{statement}; expected {expected}, so this model is not run")


@dataclass(frozen=True, slots=True)
class _Transform:
    """One transform: where it is in the configuration, for an image of that many channels."""

    config: Source
    path: str
    n_channels: int

    @property
    def is_for_image(self) -> bool:
        """Whether it is applied to the network's input, as far as is known."""
        image = self.config.at("model.x_key")
        keys = self.config.at(f"{self.path}.keys")
        applied = [self.config.follow(key) for key in keys] if isinstance(keys, list) else [keys]
        is_known = isinstance(image, str) and all(isinstance(key, str) for key in applied)
        return not is_known or image in applied

    @property
    def name(self) -> str | None:
        """The class, if it is of a known package."""
        return class_name(self.config.at(f"{self.path}._target_"), PACKAGES)

    @property
    def normalizes(self) -> bool:
        """Whether it is known to change the values of an image by a rule, not by chance."""
        return self.name is not None and _base(self.name) in {*STEP_MAKERS, *NEEDS}

    @property
    def where(self) -> str:
        """What an error begins with."""
        return f"{self.config.name}: {self.path} {self.name}"

    def steps(self, *, is_normalized: bool) -> list[Step]:
        """Return what it does as steps; ``is_normalized`` if steps were before it.

        Raises:
            BundleError: It is no step, or its arguments are not known.
        """
        if self.name is None:
            target = short(self.config.at(f"{self.path}._target_"))
            raise BundleError(
                f"{self.config.name}: predict transform {target} at {self.path} is none of "
                f"{' or '.join(PACKAGES)}; not run"
            )
        base = _base(self.name)
        if base in STEP_MAKERS:
            if unknown := sorted(self.config.uncomputed(self.path) - ANYWHERE):
                raise BundleError(
                    f"{self.where}: {', '.join(unknown)} cannot be known without computing it; "
                    "write it as a value"
                )
            return STEP_MAKERS[base](self, self.config.section(self.path))
        if base not in NO_STEPS:
            reason = "is not carried out here"
            if base in NEEDS:
                reason = f"needs {NEEDS[base]}, which no run takes"
            raise BundleError(
                f"{self.where}: predict transform {self.name} {reason}, so this model is not run"
            )
        self._require_dtype(is_normalized)
        return []

    def _require_dtype(self, is_normalized: bool) -> None:
        section = self.config.section(self.path)
        if "dtype" in section:
            # Half precision after the normalization says how the network is run; before it, counts
            # would be rounded.
            accepted = WIDE + HALF if is_normalized else WIDE
            require_accepted({"dtype": section["dtype"]}, {"dtype": accepted}, ())


StepMaker: TypeAlias = Callable[[_Transform, Section], list[Step]]


def _base(name: str) -> str:
    # MONAI's dictionary transforms have three names each: NormalizeIntensityd, …D and …Dict.
    return re.sub(r"(d|D|Dict)$", "", name)


def _normalize(transform: _Transform, section: Section) -> list[Step]:
    """MONAI's ``NormalizeIntensity``: the volume's own mean and deviation, or two numbers."""
    require_accepted(section, NORMALIZE, ANYWHERE | {"channel_wise", "subtrahend", "divisor"})
    given = [section[key] for key in ("subtrahend", "divisor") if key in section]
    if len(given) == 1:
        raise BundleError(
            f"{given[0]}; only with both subtrahend and divisor, or neither, is a model run"
        )
    n_channels = transform.n_channels
    if given:
        subtrahend, divisor = (_for_all_channels(statement, n_channels) for statement in given)
        return [Step("subtract_divide", (subtrahend, divisor or 1.0))]
    if n_channels > 1 and not _is_true(section, "channel_wise"):
        raise BundleError(
            f"{transform.where}: channel_wise is not True; {n_channels} channels are only "
            "normalized one by one"
        )
    return [Step("zscore")]


def _for_all_channels(statement: Statement, n_channels: int) -> float:
    values = statement.value if isinstance(statement.value, list) else [statement.value]
    numbers = {Statement(value, statement.origin).number() for value in values}
    if len(values) not in (1, n_channels) or len(numbers) != 1:
        raise BundleError(f"{statement}; only one number for all channels is run")
    return numbers.pop()


def _rescale(transform: _Transform, section: Section) -> list[Step]:
    """MONAI's ``ScaleIntensityRange``: from a to b, and clipped to b if asked."""
    require_accepted(section, RESCALE, ANYWHERE.union(RESCALE_NUMBERS))
    given = {key: section[key].number() for key in RESCALE_NUMBERS if key in section}
    a_min = given.get("a_min")
    a_max = given.get("a_max")
    if a_min is None or a_max is None or a_min == a_max:
        raise BundleError(f"{transform.where}: expected two different numbers a_min and a_max")
    has_range = {"b_min", "b_max"} <= given.keys()
    b_range = (given["b_min"], given["b_max"]) if has_range else (0.0, 1.0)
    steps = [Step("rescale", (a_min, a_max, *b_range))]
    if _is_true(section, "clip"):
        if not has_range:
            raise BundleError(f"{transform.where}: clip needs b_min and b_max")
        steps.append(Step("clip", b_range))
    return steps


def _is_true(section: Section, argument: str) -> bool:
    return argument in section and is_same(section[argument].value, True)


STEP_MAKERS: Mapping[str, StepMaker] = {
    "NormalizeIntensity": _normalize,
    "ScaleIntensityRange": _rescale,
}

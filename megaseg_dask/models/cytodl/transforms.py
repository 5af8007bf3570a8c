"""The transforms of a prediction, as steps with numbers; what cannot be one is refused by name."""

import re
from collections.abc import Callable, Mapping

from megaseg_dask.errors import BundleError
from megaseg_dask.models.bundle import Preprocessing, Step
from megaseg_dask.models.cytodl.config import (
    Fixed,
    Source,
    Stated,
    Statement,
    class_name,
    number,
    reference,
    require_known,
    same,
)
from megaseg_dask.models.cytodl.safe_loading import short

# Where cyto-dl's data modules keep the transforms of a prediction; and those of training, of which only
# what normalises an image says something about prediction.
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
PACKAGES = ("monai.transforms", "cyto_dl", "aics_im2im")
MAX_TRANSFORMS = 100

# Transforms that load an image or change its container, not its values.
ORDINARY = {
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
NORMALIZE: Fixed = {"nonzero": (False,), "dtype": WIDE}
RESCALE: Fixed = {"dtype": WIDE, "clip": (False, True)}
ANYWHERE = {"_target_", "keys", "allow_missing_keys"}


def read_preprocessing(config: Source, n_channels: int) -> tuple[Preprocessing, str]:
    """The steps that the predict transforms of a train_config.yaml ask for, and who says so.

    Without predict transforms, the normalisation in training is taken. Raises
    BundleError for a transform that is no step, or whose arguments are not known,
    and for transforms that are no list.
    """
    path = next((path for path in PREDICT + TRAIN if isinstance(config.at(path), list)), None)
    if path not in PREDICT:
        _require_none(config)
    if path is None:
        return Preprocessing(), reference(*((config, place) for place in PREDICT))
    origin, n_transforms = f"{config.name}: {path}", len(config.at(path))
    if n_transforms > MAX_TRANSFORMS:
        raise BundleError(
            f"{origin} has {n_transforms} transforms; at most {MAX_TRANSFORMS} are read"
        )
    steps: list[Step] = []
    for each in (f"{path}.{i}" for i in range(n_transforms)):
        if _is_for_the_image(config, each) and (path in PREDICT or _normalises(config, each)):
            steps += _steps(config, each, n_channels, normalised=bool(steps))
    return Preprocessing(tuple(steps)), origin


def _require_none(config: Source) -> None:
    """Raise BundleError if something stands where a list of predict transforms would: it is not taken for none."""
    for place in PREDICT:
        parts = place.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            found = config.statement(path)
            # A list that would have to be computed is told of, with the reference that stands in for it.
            if found is None or config.unresolved(f"{path}.transforms"):
                break
            # What `data.transforms` holds may be the lists of the stages, by name.
            is_section = end < len(parts) or (
                place == "data.transforms" and not config.mentions(path, "_target_")
            )
            if not (is_section and isinstance(found.value, Mapping)):
                expected = "a section" if end < len(parts) else "a list of transforms"
                raise BundleError(f"{found}; expected {expected}, so this model is not run")


def _is_for_the_image(config: Source, path: str) -> bool:
    """Whether a transform is applied to the network's input, as far as is known."""
    keys, image = config.at(f"{path}.keys"), config.at("model.x_key")
    applied = [config.follow(key) for key in keys] if isinstance(keys, list) else [keys]
    return (
        not isinstance(image, str)
        or image in applied
        or not all(isinstance(key, str) for key in applied)
    )


def _normalises(config: Source, path: str) -> bool:
    name = class_name(config.at(f"{path}._target_"), PACKAGES)
    return name is not None and _base(name) in {*MAKERS, *NEEDS}


def _base(name: str) -> str:
    # MONAI's dictionary transforms are known by three names each, as NormalizeIntensityd, …D and …Dict.
    return re.sub(r"(d|D|Dict)$", "", name)


def _steps(config: Source, path: str, n_channels: int, *, normalised: bool) -> list[Step]:
    stated = config.section(path)
    target = config.at(f"{path}._target_")
    name = class_name(target, PACKAGES)
    if name is None:
        known = " or ".join(PACKAGES)
        raise BundleError(
            f"{config.name}: predict transform {short(target)} at {path} is none of {known}; not run"
        )
    base, where = _base(name), f"{config.name}: {path} {name}"
    if base in MAKERS:
        if unknown := sorted(config.unknown(path) - ANYWHERE):
            raise BundleError(
                f"{where}: {', '.join(unknown)} cannot be known without computing it; write it as a value"
            )
        return MAKERS[base](stated, where, n_channels)
    if base not in ORDINARY:
        reason = (
            f"needs {NEEDS[base]}, which no run takes"
            if base in NEEDS
            else "is not carried out here"
        )
        raise BundleError(f"{where}: predict transform {name} {reason}, so this model is not run")
    if "dtype" in stated:
        # Half precision after the normalisation says how the network is run; before it, counts would be rounded.
        require_known(
            {"dtype": stated["dtype"]}, {"dtype": WIDE + HALF if normalised else WIDE}, ()
        )
    return []


def _normalize(stated: Stated, where: str, n_channels: int) -> list[Step]:
    """MONAI's ``NormalizeIntensity``: the volume's own mean and deviation, or two numbers."""
    require_known(stated, NORMALIZE, ANYWHERE | {"channel_wise", "subtrahend", "divisor"})
    numbers = [stated[key] for key in ("subtrahend", "divisor") if key in stated]
    if len(numbers) == 1:
        raise BundleError(
            f"{numbers[0]}; only with both subtrahend and divisor, or neither, is a model run"
        )
    if numbers:
        subtrahend, divisor = (_for_all_channels(statement, n_channels) for statement in numbers)
        return [Step("subtract_divide", (subtrahend, divisor or 1.0))]
    if n_channels > 1 and not (
        "channel_wise" in stated and same(stated["channel_wise"].value, True)
    ):
        raise BundleError(
            f"{where}: channel_wise is not True; {n_channels} channels are only normalised one by one"
        )
    return [Step("zscore")]


def _for_all_channels(statement: Statement, n_channels: int) -> float:
    values = statement.value if isinstance(statement.value, list) else [statement.value]
    numbers = {number(Statement(value, statement.origin)) for value in values}
    if len(values) not in (1, n_channels) or len(numbers) != 1:
        raise BundleError(f"{statement}; only one number for all channels is run")
    return numbers.pop()


def _rescale(stated: Stated, where: str, n_channels: int) -> list[Step]:
    """MONAI's ``ScaleIntensityRange``: from a to b, and clipped to b if asked."""
    del n_channels
    require_known(stated, RESCALE, ANYWHERE | {"a_min", "a_max", "b_min", "b_max"})
    given = {
        key: number(stated[key]) for key in ("a_min", "a_max", "b_min", "b_max") if key in stated
    }
    if not {"a_min", "a_max"} <= given.keys() or given["a_min"] == given["a_max"]:
        raise BundleError(f"{where}: expected two different numbers a_min and a_max")
    clip = "clip" in stated and same(stated["clip"].value, True)
    if clip and not {"b_min", "b_max"} <= given.keys():
        raise BundleError(f"{where}: clip needs b_min and b_max")
    whole = {"b_min", "b_max"} <= given.keys()
    low, high = (given["b_min"], given["b_max"]) if whole else (0.0, 1.0)
    return [
        Step("rescale", (given["a_min"], given["a_max"], low, high)),
        *[Step("clip", (low, high))] * clip,
    ]


MAKERS: Mapping[str, Callable[[Stated, str, int], list[Step]]] = {
    "NormalizeIntensity": _normalize,
    "ScaleIntensityRange": _rescale,
}

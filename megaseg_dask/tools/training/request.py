"""What a user asks of a training, and the recipe that follows from it."""

from dataclasses import asdict, dataclass, replace

from megaseg_dask.errors import BundleError, SettingsError
from megaseg_dask.models import Bundle, Preprocessing, require_patch
from megaseg_dask.models.registry import load
from megaseg_dask.tools.training.recipes import RECIPES, Recipe

# Fields of a request that take the place of the recipe's own.
_RECIPE_FIELDS = ("patches_per_image", "learning_rate", "decay", "max_epochs", "patience")


@dataclass(frozen=True, slots=True)
class Request:
    """What to train, and on which images; ``None`` leaves a value to the recipe."""

    manifest: str
    recipe: str
    out: str
    start: str | None = None
    channel: str | None = None
    label: str | None = None
    validation: float = 0.2
    patch: tuple[int, int, int] | None = None
    patches_per_image: int | None = None
    learning_rate: float | None = None
    decay: float | None = None
    max_epochs: int | None = None
    patience: int | None = None
    max_time: str | None = None
    accelerator: str = "auto"
    overwrite: bool = False


def resolve_recipe(request: Request) -> tuple[Recipe, Bundle | None]:
    """Return the recipe with the values of a request, and the bundle to start from.

    The network is that of the bundle, if there is one.

    Raises:
        SettingsError: for an unknown recipe, or a patch that the network cannot take.
        BundleError: for a bundle that is missing, or whose network cannot be trained.
    """
    if request.recipe not in RECIPES:
        raise SettingsError(f"--recipe {request.recipe}: expected one of {', '.join(RECIPES)}")
    requested = {name: getattr(request, name) for name in _RECIPE_FIELDS}
    requested["patch_shape"] = request.patch
    changes = {name: value for name, value in requested.items() if value is not None}
    recipe = replace(RECIPES[request.recipe], **changes)
    bundle = None
    if request.start is not None:
        bundle = _load_start(request.start)
        recipe = replace(recipe, network=bundle.network)
    require_patch(recipe.network, recipe.patch_shape)
    return recipe, bundle


def _load_start(model: str) -> Bundle:
    try:
        _, bundle = load(model)
    except BundleError as error:
        raise BundleError(f"--from {str(error).removeprefix('--model ')}") from error
    network = bundle.network
    has_one_channel = network.in_channels == network.out_channels == 1
    if not has_one_channel or bundle.preprocessing != Preprocessing():
        raise BundleError(
            f"--from {model}: megaseg can train only a network with one input channel and one "
            "output channel, on images that are normalized only by a z-score"
        )
    if not bundle.is_plain:
        raise BundleError(f"--from {model}: megaseg cannot train a head with its own layers")
    return bundle


def identity_of(recipe: Recipe, bundle: Bundle | None, examples_digest: str) -> dict[str, object]:
    """Return what a training and its continuation share, as JSON values.

    The number of epochs, the time and the accelerator may differ.
    """
    fields = asdict(recipe)
    del fields["max_epochs"]
    return {
        "recipe": fields,
        "from": bundle.digest if bundle else None,
        "examples": examples_digest,
    }

"""One training: a request is checked, cyto-dl trains in its process, a bundle is published."""

from dataclasses import asdict

from megaseg_dask.events import Emit, Trained
from megaseg_dask.models import load_bundle
from megaseg_dask.run.lease import Leases
from megaseg_dask.stores import Location
from megaseg_dask.tools.training.card import Training, read_losses, write_card
from megaseg_dask.tools.training.checks import require_apart
from megaseg_dask.tools.training.cytodl_process import run_cytodl
from megaseg_dask.tools.training.dataset import digest_of, write_dataset
from megaseg_dask.tools.training.environment import find_python
from megaseg_dask.tools.training.examples import common_size_um
from megaseg_dask.tools.training.experiment import describe_experiment
from megaseg_dask.tools.training.folder import CARD, TrainingFolder
from megaseg_dask.tools.training.manifest import read_examples
from megaseg_dask.tools.training.recipes import Recipe
from megaseg_dask.tools.training.request import Request, identity_of, resolve_recipe
from megaseg_dask.tools.training.splits import split_examples


def train(request: Request, emit: Emit) -> Trained:
    """Train a recipe, or continue where it stopped, and write the bundle with its card.

    Raises:
        SettingsError: for a wrong request, before anything is written.
        SourceError: for images that cannot be trained on, before anything is written.
        TargetError: for a folder that is not free, before anything is written.
        TaskError: if cyto-dl fails, or the training diverges.
    """
    recipe, bundle = resolve_recipe(request)
    listed = read_examples(request.manifest, request.channel, request.label)
    examples = split_examples(listed, request.validation, recipe.patch_shape)
    require_apart(examples)
    python = find_python()
    folder = TrainingFolder(request.out)
    identity = identity_of(recipe, bundle, digest_of(examples))
    folder.require_free(identity, overwrite=request.overwrite)
    if not request.overwrite:
        folder.require_more_epochs(recipe.max_epochs)
    with folder.writing():
        folder.work.mkdir(parents=True, exist_ok=True)
        with Leases(Location.of(folder.work)).hold():
            if request.overwrite:
                folder.clear()
            limits: dict[str, object] = {
                "max_epochs": recipe.max_epochs,
                "max_time": request.max_time,
            }
            earlier = _earlier_result(folder, limits)
            if earlier is not None:
                return earlier
            folder.write_record(identity)
            n_examples = write_dataset(examples, folder.data)
            experiment = describe_experiment(request, recipe, bundle, folder)
            finished = run_cytodl(python, experiment, folder, recipe, emit)
            training = Training(request.manifest, n_examples, finished, common_size_um(examples))
            result = _publish(folder, recipe, training)
            done = asdict(result)
            del done["already_done"]
            folder.write_record({**identity, "ends": limits, "done": done})
            folder.remove_data()
            return result


def _earlier_result(folder: TrainingFolder, limits: dict[str, object]) -> Trained | None:
    """Return the result of a training that is over; ``None`` if something is left to train."""
    record = folder.read_record() or {}
    done = record.get("done")
    if not done or not folder.has_bundle():
        return None
    # More epochs or more time do not change a training that ran out of patience.
    is_over = record["ends"] == limits or done["stopped"] == "patience"
    return Trained(**done, already_done=True) if is_over else None


def _publish(folder: TrainingFolder, recipe: Recipe, training: Training) -> Trained:
    """Make the folder a bundle with its card, and return what was trained."""
    folder.publish(training.finished.checkpoint, training.voxel_size_um)
    bundle = load_bundle(folder.out)
    losses = read_losses(folder.out / "metrics.csv")
    write_card(folder.out / CARD, bundle, recipe, training, losses)
    return Trained(
        bundle=str(folder.out),
        digest=bundle.digest,
        n_epochs=training.finished.n_epochs,
        best_epoch=losses.best_epoch,
        best_loss=losses.best_loss,
        stopped=training.finished.stopped,
        wall_s=losses.wall_s,
    )

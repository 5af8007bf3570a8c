"""A bundle knows the size of its voxels: its own statement, that of an import, or a publication."""

import numpy as np
import pytest

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.errors import BundleError
from megaseg_dask.models import NewBundle, load_bundle, read_facts, save_bundle
from megaseg_dask.models.cache import import_bundle
from megaseg_dask.models.registry import describe, load
from megaseg_dask.tools.training.examples import Example, common_size_um
from megaseg_dask.tools.training.folder import TrainingFolder
from tests.fixtures.bundles import (
    TINY,
    seeded_network,
    train_config,
    write_checkpoint,
    write_folder,
)

SIZE = (0.5, 0.2, 0.25)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))


def test_a_saved_bundle_says_its_size_and_keeps_its_digest(tmp_path):
    state = seeded_network().state_dict()
    digests = set()
    for name, size in {"none": None, "some": SIZE}.items():
        save_bundle(tmp_path / name, NewBundle(TINY, (16, 32, 32), 0.25, 1, size), state)
        bundle = load_bundle(tmp_path / name)
        assert bundle.voxel_size_um == size == read_facts(tmp_path / name).voxel_size_um
        digests.add(bundle.digest)
    assert len(digests) == 1
    assert bundle.origins["voxel_size_um"] == "train_config.yaml: data._aux.voxel_size_um"


def test_a_saved_bundle_says_the_range_of_its_sizes(tmp_path):
    extremes = ((0.2, 0.06, 0.06), (0.5, 0.3, 0.3))
    state = seeded_network().state_dict()
    save_bundle(tmp_path / "a", NewBundle(TINY, (16, 32, 32), 0.25, 1, SIZE, extremes), state)
    bundle = load_bundle(tmp_path / "a")
    assert bundle.voxel_range_um == extremes == read_facts(tmp_path / "a").voxel_range_um
    assert bundle.origins["voxel_range_um"] == "train_config.yaml: data._aux.voxel_range_um"


@pytest.mark.parametrize(
    "stated", [[1, 0], [[1, 1, 1]], [[2, 1, 1], [1, 1, 1]], [[1, 1], [2, 2]], "wide", 3]
)
def test_what_is_no_range_is_refused_by_its_place(stated, tmp_path):
    config = train_config()
    config["data"]["_aux"]["voxel_range_um"] = stated
    folder = write_folder(tmp_path / "x", config=config)
    with pytest.raises(BundleError, match="voxel_range_um"):
        load_bundle(folder)


@pytest.mark.parametrize("stated", [[1, 2], "large", [1, 0, 1], [1, -1, 1], [True, 1, 1]])
def test_what_is_no_size_is_refused_by_its_place(stated, tmp_path):
    config = train_config()
    config["data"]["_aux"]["voxel_size_um"] = stated
    folder = write_folder(tmp_path / "x", config=config)
    with pytest.raises(BundleError, match="voxel_size_um is"):
        load_bundle(folder)


def test_a_size_that_is_given_at_import_comes_first(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt")
    import_bundle(path, "plain")
    import_bundle(path, "sized", voxel_size_um=SIZE)
    assert describe("plain")[1].voxel_size_um is None
    assert describe("sized")[1].voxel_size_um == SIZE == load("sized")[1].voxel_size_um


def test_the_published_models_have_the_published_size(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt")
    import_bundle(path, "MegaSeg_v1")
    _, facts = describe("MegaSeg_v1")
    assert facts.voxel_size_um == (0.29, 0.108333, 0.108333)
    assert facts.origins["voxel_size_um"] == "published"
    starter = describe("starter")[1]
    assert starter.voxel_size_um == (0.29, 0.108333, 0.108333)
    assert starter.voxel_range_um == ((0.2, 0.06, 0.06), (0.5, 0.3, 0.3))


class Nothing:
    """Images that nobody reads."""

    def read(self, box):
        return np.zeros(box.shape)


@pytest.mark.parametrize(
    ("sizes", "common"),
    [
        ([SIZE, SIZE], SIZE),
        ([SIZE, (0.502, 0.2, 0.25)], SIZE),
        ([SIZE, (0.6, 0.2, 0.25)], None),
        ([SIZE, None], None),
        ([None], None),
    ],
)
def test_a_training_says_the_size_that_all_its_images_have(sizes, common, tmp_path):
    box = Box.of((16, 16, 16))
    examples = [Example("a", "a", Nothing(), Nothing(), box, None, size) for size in sizes]
    assert common_size_um(examples) == common
    folder = TrainingFolder(str(tmp_path / "out"))
    written = write_folder(folder.work)
    for name in ("metrics.csv", "curves.png"):
        (folder.work / name).write_text("")
    folder.publish(written / "checkpoints" / "epoch_003.ckpt", common_size_um(examples))
    assert load_bundle(folder.out).voxel_size_um == common

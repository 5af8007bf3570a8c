"""The cache of models.

Names, records, what is imported and what is refused, without any network.
"""

import json
import signal
import zipfile
from pathlib import Path

import pytest
import zarr

from megaseg_dask.cli.app import main
from megaseg_dask.errors import BundleError, MegasegError, SettingsError
from megaseg_dask.models import cache, load_bundle, registry, staging
from megaseg_dask.models.cache import import_bundle, is_name, read_record
from megaseg_dask.models.cards import PUBLISHED_CARDS, card_of
from megaseg_dask.models.home import home as cache_home
from megaseg_dask.stores import Location
from tests.fixtures.bundles import write_checkpoint, write_folder, write_zip
from tests.fixtures.images import blobs, write_image

HOSTILE = [
    "../x",
    "a/b",
    "/etc/x",
    "..",
    ".",
    "",
    ".hidden",
    "-x",
    "a\nb",
    "x" * 65,
    "a.zip",
    "b.ckpt",
    "Starter",
    "starter",
    "C:\\x",
    "a b",
    "x.",
    "é",
    "%2e%2e",
    "~",
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def run(capsys):
    """Run the command line in this process; returns exit code, stdout and stderr."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    yield call
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


FORMS = {
    "zip": lambda d: write_zip(d / "megaSeg.zip"),
    "folder": lambda d: write_folder(d / "experiment", epochs=(2, 3)),
    "folder above": lambda d: write_folder(d / "above/experiment").parent,
    "checkpoint": lambda d: write_checkpoint(d / "a.ckpt"),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_imported_bundle_is_the_same_bundle(form, tmp_path):
    path = FORMS[form](tmp_path)
    record = import_bundle(path, "mine")
    found, bundle = registry.load("mine")
    assert found == record.path == registry.locate("mine")
    assert (bundle.digest, bundle.name) == (load_bundle(path).digest, "mine")
    assert record == read_record("mine")
    assert (record.sha256, record.n_bytes) == (cache.sha256_of(found), found.stat().st_size)
    assert cache.cached_names() == ["mine"]


def test_of_a_folder_only_the_chosen_checkpoint_is_kept(tmp_path):
    folder = write_folder(tmp_path / "experiment", epochs=(2, 3))
    write_checkpoint(folder / "checkpoints/epoch_002.ckpt", seed=7)
    record = import_bundle(folder, "second", checkpoint="epoch_002")
    assert record.digest == load_bundle(folder, "epoch_002").digest != load_bundle(folder).digest
    with zipfile.ZipFile(record.path) as archive:
        assert archive.namelist() == ["train_config.yaml", "checkpoints/epoch_002.ckpt"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_no_names_of_folders_are_refused(name, tmp_path, home):
    path = write_checkpoint(tmp_path / "a.ckpt")
    assert not is_name(name)
    for attempt in (lambda: import_bundle(path, name), lambda: registry.fetch(name)):
        with pytest.raises(BundleError, match="a model cannot be called"):
            attempt()
    assert not home.exists()


def test_a_name_that_is_taken(tmp_path):
    one, two = write_checkpoint(tmp_path / "1.ckpt"), write_checkpoint(tmp_path / "2.ckpt", seed=1)
    first = import_bundle(one, "mine")
    with pytest.raises(BundleError, match=r"mine is already in the cache; .* pass --overwrite"):
        import_bundle(two, "mine")
    assert registry.load("mine")[1].digest == first.digest
    second = import_bundle(two, "mine", overwrite=True)
    assert registry.load("mine")[1].digest == second.digest != first.digest


def test_what_is_no_bundle_replaces_nothing(tmp_path, home):
    first = import_bundle(write_checkpoint(tmp_path / "1.ckpt"), "mine")
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(b"nothing of the kind")
    with pytest.raises(BundleError, match=r"bad.ckpt: bad.ckpt is not a checkpoint"):
        import_bundle(bad, "mine", overwrite=True)
    with pytest.raises(BundleError, match="does not exist; give a bundle's folder"):
        import_bundle(tmp_path / "none", "other")
    assert registry.load("mine")[1].digest == first.digest
    assert [path.name for path in (home / "models").iterdir()] == ["mine"]


def test_a_bundle_that_changed_in_the_cache_is_refused(tmp_path, run):
    record = import_bundle(write_checkpoint(tmp_path / "1.ckpt"), "mine")
    write_checkpoint(record.path, seed=1)
    for attempt in (
        lambda: registry.load("mine"),
        lambda: registry.load(str(record.path)),
        lambda: registry.fetch("mine"),
    ):
        with pytest.raises(
            BundleError,
            match=r"has digest \w+, its record says \w+; get it again with `megaseg models",
        ):
            attempt()
    image = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))
    code, _, err = run("segment", image, tmp_path / "out.zarr", "--model", "mine")
    assert (code, "its record says" in err) == (2, True)
    record.path.unlink()
    with pytest.raises(BundleError, match="is missing, but its record exists"):
        registry.load("mine")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "mine"}', None])
def test_a_broken_record_is_named(content, tmp_path, run):
    record = import_bundle(write_checkpoint(tmp_path / "1.ckpt"), "mine")
    path = record.path.with_name("record.json")
    # The last: a record that leads out of its folder.
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"file": "../../x"})
        if content is None
        else content
    )
    with pytest.raises(BundleError, match=r"record.json is damaged; get it again with"):
        registry.locate("mine")
    code, out, _ = run("models", "list", "--json")
    states = {row["name"]: row["state"] for row in json.loads(out)["models"]}
    assert (code, states["mine"]) == (0, "damaged")
    import_bundle(tmp_path / "1.ckpt", "mine", overwrite=True)
    assert registry.locate("mine") == record.path


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "1.ckpt")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", Path("/proc/megaseg")):
        monkeypatch.setenv("MEGASEG_HOME", str(place))
        with pytest.raises(
            SettingsError,
            match=f"mine cannot be written to {place}: .*; set MEGASEG_HOME to a folder",
        ):
            import_bundle(path, "mine")
        assert cache.cached_names() == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MEGASEG_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_home() == Path.home() / ".cache/megaseg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "megaseg"


def test_a_name_comes_before_a_path_and_a_path_before_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beside = write_folder(tmp_path / "MegaSeg_v1")
    assert registry.locate("MegaSeg_v1") == beside
    record = import_bundle(beside, "MegaSeg_v1")
    assert registry.locate("MegaSeg_v1") == record.path
    assert registry.locate("./MegaSeg_v1") == beside


@pytest.mark.parametrize("name", registry.PUBLISHED)
def test_a_published_model_that_is_not_here_says_how_to_get_it(name, run, tmp_path):
    image = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))
    code, _, err = run("segment", image, tmp_path / "out.zarr", "--model", name)
    assert code == 2
    for part in (
        "MEGASEG_OFFLINE is set",
        f"megaseg models fetch {name}",
        "megaseg models import",
        "--model starter",
    ):
        assert part in err
    assert len(err.splitlines()) == 1


def test_the_card_says_where_each_setting_came_from(tmp_path, run):
    import_bundle(write_zip(tmp_path / "a.zip"), "MegaSeg_light")
    code, out, _ = run("models", "show", "MegaSeg_light")
    assert code == 0
    for part in (
        "Allen Institute",
        "4.8 MB",
        "patch_shape",
        "hyper_parameters.inference_args.roi_size",
        "16,16,16",
    ):
        assert part in out
    assert "16,670,177" in run("models", "show", "MegaSeg_v1")[1]
    assert "that of this package" in run("models", "show", "starter")[1]
    assert "not stated in the bundle" in run("models", "show", tmp_path / "a.zip")[1]
    code, _, err = run("models", "show", "nope")
    assert (code, "not in the cache, and not an existing path" in err) == (2, True)


def test_the_card_leaves_no_origin_out(tmp_path):
    bundle = load_bundle(path := write_zip(tmp_path / "a.zip"))
    settings = card_of("a", path, bundle)["settings"]
    assert set(bundle.origins) <= set(settings)
    assert all(stated["value"] is not None for key, stated in settings.items() if key != "weights")
    assert PUBLISHED_CARDS.keys() == registry.PUBLISHED.keys()


def test_commands_end_with_one_json_line(tmp_path, run):
    path = write_checkpoint(tmp_path / "a.ckpt")
    code, out, _ = run("models", "import", path, "mine", "--json")
    assert (code, json.loads(out)["digest"]) == (0, load_bundle(path).digest)
    code, out, err = run("models", "import", path, "../mine", "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)
    assert "cannot be called '../mine'" in err
    assert run("models", "fetch", "mine")[0] == 0
    assert run("models", "fetch", "MegaSeg_v1", "--json")[0] == 2


@pytest.mark.slow
def test_segment_takes_a_model_by_its_name(tmp_path, run):
    two = write_zip(tmp_path / "a.zip", epochs=(2, 3))
    with (
        zipfile.ZipFile(write_zip(tmp_path / "other.zip", seed=7)) as other,
        zipfile.ZipFile(two, "a") as archive,
    ):
        archive.writestr(
            "megaSeg/checkpoints/epoch_001.ckpt", other.read("megaSeg/checkpoints/epoch_003.ckpt")
        )
    import_bundle(two, "cells")
    image = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))
    command = (
        "segment",
        image,
        tmp_path / "out.zarr",
        "--model",
        "cells",
        "--threads",
        1,
        "--json",
    )
    code, out, err = run(*command, "--checkpoint", "epoch_001")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["status"] == "done"
    digest = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["megaseg"]["model"]["digest"]
    assert digest == load_bundle(two, "epoch_001").digest != load_bundle(two).digest
    # Another of them is another model.
    assert run(*command)[0] == 2


@pytest.mark.parametrize(
    ("inside", "checkpoint"), [("", "epoch_002"), ("checkpoints/epoch_002.ckpt", None)]
)
def test_a_copy_of_one_checkpoint_keeps_its_configuration(inside, checkpoint, tmp_path):
    step = {
        "_target_": "monai.transforms.ScaleIntensityRanged",
        "keys": "raw",
        "a_min": 0,
        "a_max": 9,
    }
    config = {"data": {"transforms": {"predict": {"transforms": [step]}}}}
    path = write_folder(tmp_path / "experiment", epochs=(2, 3), config=config) / inside
    write_checkpoint(tmp_path / "experiment/checkpoints/epoch_002.ckpt", seed=7)
    digest = load_bundle(path, checkpoint).digest
    assert (
        import_bundle(path, "mine", checkpoint=checkpoint).digest
        == registry.load("mine")[1].digest
        == digest
    )
    # As workers on another machine get it.
    staging.put(str(path), digest, Location.of(tmp_path / "run"), checkpoint)
    copy = staging.Copies(str(tmp_path / "run"), str(tmp_path / "scratch")).fetch(digest)
    assert load_bundle(copy, checkpoint).digest == digest


def test_which_checkpoint(tmp_path, run):
    folder = write_folder(tmp_path / "experiment", epochs=(2, 3))
    image = write_image(tmp_path / "image.zarr", blobs((16, 32, 32)))
    plan = ("plan", image, tmp_path / "out.zarr", "--model", folder, "--checkpoint")
    code, _, err = run(*plan, "epoch_9")
    assert (
        code,
        "there are: epoch_002.ckpt, epoch_003.ckpt; choose one with --checkpoint" in err,
    ) == (2, True)
    code, _, err = run(*plan, "epoch_002", "--model", "starter")
    assert (code, "--checkpoint works with one --model" in err) == (2, True)
    record = import_bundle(write_zip(tmp_path / "a.zip", epochs=(2, 3)), "cells")
    record.path.write_bytes(write_zip(tmp_path / "b.zip", epochs=(2, 3), seed=1).read_bytes())
    code, _, err = run("models", "show", "cells", "--checkpoint", "epoch_002")
    assert (code, "has SHA-256" in err) == (2, True)


def test_errors_are_ours(tmp_path):
    for model in ("nope", "s3://bucket/a.zip", "a\nb", "\x1b[2J"):
        with pytest.raises(MegasegError) as raised:
            registry.locate(model)
        assert raised.value.exit_code == 2
        assert str(raised.value).isprintable()


def test_a_bundle_elsewhere_needs_no_cache(tmp_path):
    models = tmp_path / "home/models"
    models.parent.mkdir(exist_ok=True)
    models.symlink_to("models")
    with pytest.raises(BundleError, match="cannot be read"):
        cache.cached_names()
    assert registry.describe("starter")[0] == registry.STARTER

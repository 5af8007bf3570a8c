"""Facts of bundles.

The same as those of the loaded bundle, without torch from the second time on.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megaseg_dask.errors import BundleError
from megaseg_dask.models import BundleFacts, load_bundle, read_facts, registry
from megaseg_dask.models import facts as facts_module
from megaseg_dask.models.cache import import_bundle
from megaseg_dask.models.facts import SHIPPED_RECORD, record_of, write_record
from tests.fixtures.bundles import write_checkpoint, write_folder, write_zip

FORMS = {
    "checkpoint": lambda d: write_checkpoint(d / "a.ckpt"),
    "folder": lambda d: write_folder(d / "experiment", epochs=(2, 3)),
    "folder above": lambda d: write_folder(d / "above/experiment").parent,
    "checkpoint in its folder": lambda d: write_folder(d / "x") / "checkpoints/epoch_003.ckpt",
    "zip": lambda d: write_zip(d / "megaSeg.zip"),
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """What was loaded with torch."""
    calls: list[str] = []

    def load(path, checkpoint=None):
        calls.append(str(path))
        return load_bundle(path, checkpoint)

    monkeypatch.setattr(facts_module, "load_bundle", load)
    return calls


@pytest.mark.parametrize("form", FORMS)
def test_facts_are_those_of_the_bundle_and_read_once(form, tmp_path, loads):
    path = FORMS[form](tmp_path)
    first = read_facts(path)
    again = read_facts(path)
    bundle = load_bundle(path)
    assert first == again == bundle.facts
    assert type(again) is BundleFacts
    assert again.n_parameters == sum(tensor.numel() for tensor in bundle.weights.values())
    assert loads == [str(path)]


def test_of_several_checkpoints_each_has_its_facts(tmp_path, loads):
    folder = write_folder(tmp_path / "x", epochs=(2, 3))
    write_checkpoint(folder / "checkpoints/epoch_002.ckpt", seed=7)
    for _ in range(2):
        assert read_facts(folder) == load_bundle(folder).facts
        assert read_facts(folder, "epoch_002") == load_bundle(folder, "epoch_002").facts
    assert len(loads) == 2


def test_the_same_bytes_elsewhere_have_their_own_name(tmp_path, loads):
    path = write_checkpoint(tmp_path / "a.ckpt")
    digest = read_facts(path).digest
    renamed = path.rename(tmp_path / "b.ckpt")
    assert (read_facts(renamed).name, read_facts(renamed).digest) == ("b", digest)
    moved = tmp_path / "other/b.ckpt"
    moved.parent.mkdir()
    assert read_facts(renamed.rename(moved)).origins["weights"].startswith("b.ckpt")


@pytest.mark.parametrize("form", ["checkpoint", "folder", "zip"])
def test_other_bytes_are_another_bundle_even_of_the_same_size_and_date(form, tmp_path):
    path = FORMS[form](tmp_path)
    before = read_facts(path)
    file = path / "checkpoints/epoch_003.ckpt" if path.is_dir() else path
    stat = file.stat()
    other = FORMS[form](tmp_path / "other")
    if form == "zip":
        other = write_zip(tmp_path / "third.zip", seed=1)
    else:
        other = write_checkpoint(tmp_path / "third.ckpt", seed=1)
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read_facts(path).digest == load_bundle(path).digest != before.digest


def test_another_configuration_is_another_bundle(tmp_path):
    folder = write_folder(tmp_path / "x", hyper_parameters=False)
    before = read_facts(folder)
    config = folder / "train_config.yaml"
    config.write_text(config.read_text().replace("overlap: 0.5", "overlap: 0.25"))
    assert read_facts(folder).overlap == (0.25, 0.25, 0.25) != before.overlap
    config.unlink()
    assert read_facts(folder).origins["overlap"] == "reference value"


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"key": "x"}', "another's"])
def test_a_damaged_record_is_not_used(damage, tmp_path, home, loads):
    path = write_checkpoint(tmp_path / "a.ckpt")
    read_facts(path)
    (record,) = (home / "facts").iterdir()
    if damage == "another's":
        other = write_checkpoint(tmp_path / "b.ckpt", seed=1)
        write_record(record_of(other), record)
    else:
        record.write_bytes(damage)
    assert read_facts(path) == load_bundle(path).facts
    assert len(loads) >= 2
    assert read_facts(path) == load_bundle(path).facts


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "file"))
    path = write_checkpoint(tmp_path / "a.ckpt")
    assert read_facts(path) == load_bundle(path).facts


def test_what_is_no_bundle_is_refused_and_not_recorded(tmp_path, home):
    (tmp_path / "a.ckpt").write_bytes(b"nothing of the kind")
    for path in (tmp_path / "a.ckpt", tmp_path / "none", tmp_path):
        with pytest.raises(BundleError, match=f"^{path}: "):
            read_facts(path)
    assert not home.exists()


def test_the_record_that_ships_is_that_of_the_starter(tmp_path):
    write_record(record_of(SHIPPED_RECORD.parent), tmp_path / "facts.json")
    assert (tmp_path / "facts.json").read_bytes() == SHIPPED_RECORD.read_bytes(), (
        "the starter or the reading of bundles changed: see starter/export.py"
    )


@pytest.mark.parametrize("model", ["starter", "mine"])
def test_a_model_is_described_without_torch(model, tmp_path):
    import_bundle(write_zip(tmp_path / "a.zip"), "mine")
    code = (
        "import sys; from megaseg_dask.models import registry;"
        f"print(registry.describe({model!r})[1].digest, {{'torch', 'monai'}} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [registry.load(model)[1].digest, "set()"]

"""An absent, short or replaced object of ours is a loss: it is found, and made again."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

from megaseg_dask import open_image
from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import DataError, SettingsError, SourceError, TargetError
from megaseg_dask.events import Progress
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run import conclude
from megaseg_dask.run.job_array import join_run, read_plan, record_plans, run_tasks
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.losses import undo_losses
from megaseg_dask.run.runner import relabel
from megaseg_dask.run.status import status
from megaseg_dask.run.target import publish
from megaseg_dask.run.tasks import worker
from megaseg_dask.stores import METADATA, Location
from megaseg_dask.stores.arrays import clear_array_cache
from megaseg_dask.tools.evaluate import evaluate_images
from megaseg_dask.tools.report.write import write_report
from tests.counts.test_engine_calls import contents
from tests.fixtures.images import blobs, write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here

SHAPE = (16, 32, 96)
OPTIONS = {"engine": "torch", "threads": 1, "overlap": 0, "retries": 0}
BLOCKS = {
    **OPTIONS,
    "block": "16,32,32",
    "threshold": "otsu",
    "fill_holes": 30,
    "outputs": "labels,scores,mask,measurements",
}
# Written by the client, and read by nobody else before it is written again.
JOURNAL = ("plan.json", "journal", "log")


class Tasks:
    """Which tasks run, and what happens before one of them."""

    def __init__(self) -> None:
        self.acts = {}
        self.ran = []

    def run_task(self, workspace, stage, index, original=worker.run_task):
        self.acts.pop((stage, index), lambda: None)()
        summary = original(workspace, stage, index)
        self.ran.append((stage, index))
        return summary


@pytest.fixture
def tasks(monkeypatch):
    tasks = Tasks()
    monkeypatch.setattr(worker, "run_task", tasks.run_task)
    return tasks


class Case:
    def __init__(self, folder, bundle, tasks, options, shape=SHAPE, n_levels=1, **image_options):
        self.folder, self.tasks = folder, tasks
        data = blobs(shape)
        levels = [data[..., :: 2**level, :: 2**level] for level in range(n_levels)]
        self.source = write_image(folder / "image.zarr", *levels, **image_options)
        self.settings = parse_settings({"model": str(bundle), **options})
        self.target = folder / "out.zarr"
        self.run_folder = folder / "out.zarr.run/megaseg"
        self.segment(folder / "calm.zarr")
        self.tasks.ran.clear()

    def segment(self, target=None):
        events = []
        where = str(target or self.target)
        result = segment_here(str(self.source), where, self.settings, emit=events.append)
        assert result.status == "done", result.failures
        shown = [event for event in events if isinstance(event, Progress)]
        assert all(event.n_done <= event.n_tasks for event in shown)
        return result

    def segment_with(self, **options):
        """Segment into another target; failures of tasks are raised."""
        settings = parse_settings({**self.settings.model_dump(exclude_unset=True), **options})
        target = self.folder / f"with{len(list(self.folder.iterdir()))}.zarr"
        result = segment_here(str(self.source), str(target), settings)
        for failure in result.failures:
            raise DataError(failure.error)

    def stop_before(self, stage, index=0):
        def stop():
            raise KeyboardInterrupt

        self.tasks.acts[stage, index] = stop
        with pytest.raises(KeyboardInterrupt):
            self.segment()
        self.before = list(self.tasks.ran)
        self.tasks.ran.clear()

    def objects(self):
        """All objects of ours that later tasks or readers rely on."""
        for root in (self.target, self.run_folder):
            for path in sorted(root.rglob("*")):
                if path.is_file() and path.relative_to(root).parts[0] not in JOURNAL:
                    yield path

    def again(self):
        return [task for task in self.tasks.ran if task in self.before]

    def assert_as_calm(self):
        self.segment()
        found, calm = contents(self.target), contents(self.folder / "calm.zarr")
        assert found.keys() == calm.keys()
        different = [str(key) for key, data in found.items() if data != calm[key]]
        assert not different


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


HARM = [delete, truncate, empty, zero]


@pytest.mark.parametrize(
    ("lost", "redone"),
    [
        ("out.zarr/0/c/0/0/1", [("segment", 1)]),
        ("out.zarr.run/megaseg/work/0/0/logits/c/0/0/2", [("segment", 2)]),
        ("out.zarr.run/megaseg/work/0/0/histograms/1.npz", [("histogram", 1)]),
        ("out.zarr.run/megaseg/work/0/0/fragments/c/0/0/0", [("label", 0)]),
        ("out.zarr.run/megaseg/work/0/0/objects/tables/1", [("join", 0)]),
        ("out.zarr.run/megaseg/work/0/source/0", [("measure", 0)]),
        ("out.zarr.run/megaseg/work/0/0/logits/zarr.json", []),
        ("out.zarr/0/zarr.json", []),
        ("out.zarr/zarr.json", []),
        ("out.zarr.run/megaseg/volumes/0.json", []),
    ],
)
def test_an_object_that_is_lost_before_a_resume_is_made_again(
    lost, redone, tmp_path, tiny_bundle, tasks
):
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS)
    case.stop_before("relabel")
    (tmp_path / lost).unlink()
    case.assert_as_calm()
    assert case.again() == redone


@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_object_of_a_finished_volume_is_made_again(harm, tmp_path, tiny_bundle, tasks):
    """One task a volume: only that volume runs again."""
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS, (3, *SHAPE), axes="tzyx")
    case.stop_before("volume", 2)
    harm(case.target / "labels/megaseg/0/c/1/0/0/0")
    case.assert_as_calm()
    assert case.again() == [("volume", 1)]


def test_our_arrays_are_written_whole(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, {**BLOCKS, "threshold": 0.999999})
    case.segment()
    labels = zarr.open_array(case.target / "labels/megaseg/0", mode="r")
    assert not np.asarray(labels[...]).any()
    assert labels.nchunks_initialized == labels.nchunks


@pytest.mark.parametrize("options", [OPTIONS, BLOCKS], ids=["one task", "staged"])
@pytest.mark.parametrize("remove", ["all", "chunk", "replaced"])
def test_a_target_that_is_harmed_in_mid_run_is_not_published_so(
    remove, options, tmp_path, tiny_bundle, tasks
):
    axes = {"axes": "tzyx"} if options is OPTIONS else {}
    shape = (2, *SHAPE) if options is OPTIONS else SHAPE
    case = Case(tmp_path, tiny_bundle, tasks, options, shape, **axes)
    chunk = case.target / ("0/c/0/0/0/0" if options is OPTIONS else "0/c/0/0/1")

    def harm():
        match remove:
            case "all":
                shutil.rmtree(case.target)
            case "chunk":
                chunk.unlink()
            case "replaced":
                zero(chunk)

    tasks.acts["volume" if options is OPTIONS else "relabel", 1] = harm
    case.assert_as_calm()


def test_what_is_lost_while_it_is_needed_is_not_read_as_background(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS)
    chunk = case.run_folder / "work/0/0/fragments/c/0/0/1"
    tasks.acts["relabel", 1] = chunk.unlink
    case.assert_as_calm()


def test_a_coarser_level_is_made_of_no_chunk_that_is_gone(tmp_path, tiny_bundle, tasks):
    """Also if it is back later, when listings find nothing."""
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS, n_levels=4)
    chunk = case.target / "1/c/0/0/0"
    away = tmp_path / "away"
    tasks.acts["downsample-2", 0] = lambda: chunk.rename(away)
    tasks.acts["downsample-3", 0] = lambda: away.rename(chunk)
    result = segment_here(str(case.source), str(case.target), case.settings)
    assert [failure.stage for failure in result.failures] == ["downsample-2"]
    assert "out.zarr/1/c/0/0/0 was written but is missing now" in result.failures[0].error
    case.assert_as_calm()


@pytest.mark.parametrize("kind", ["fragments", "logits"])
def test_lost_metadata_of_intermediate_data_are_written_again(kind, tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS)
    case.stop_before("cutoff" if kind == "logits" else "relabel")
    (case.run_folder / f"work/0/0/{kind}/zarr.json").unlink()
    clear_array_cache()
    case.assert_as_calm()
    assert not case.again()


def test_a_finished_volume_is_not_made_of_what_is_left_of_its_intermediate_data(
    tmp_path, tiny_bundle, tasks
):
    """A run was killed while it removed them."""
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS, (2, *SHAPE), axes="tzyx")
    work = case.run_folder / "work"
    tasks.acts["relabel", 2] = lambda: shutil.copytree(work / "0", tmp_path / "left")
    case.stop_before("relabel", 5)
    for chunks in (tmp_path / "left").rglob("c"):
        shutil.rmtree(chunks)
    shutil.copytree(tmp_path / "left", work / "0")
    (case.target / "labels/megaseg/0/c/0/0/0/1").unlink()
    case.assert_as_calm()


def test_thousands_of_lost_objects_are_taken_back_with_few_records(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS, (6, *SHAPE), axes="tzyx")
    case.stop_before("volume", 5)
    for path in case.target.glob("0/c/*/0/0/0"):
        path.unlink()
    plan = read_plan(str(case.target), "megaseg")
    n_before = len(list((case.run_folder / "journal").iterdir()))
    assert undo_losses(plan, Journal.read(plan)) == 5
    assert len(list((case.run_folder / "journal").iterdir())) == n_before + 1


def test_a_copy_without_times_and_a_late_writer_lose_nothing(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS)
    case.stop_before("relabel")
    for path in case.objects():
        path.write_bytes(path.read_bytes())
    case.assert_as_calm()
    assert not case.again()


@pytest.mark.parametrize(
    "lost",
    [
        "out.zarr/zarr.json",
        "out.zarr/0/zarr.json",
        "out.zarr/0/c/0/0/1",
        "out.zarr/labels/zarr.json",
        "out.zarr/labels/megaseg/zarr.json",
        "out.zarr/labels/megaseg/0/c/0/0/0",
        "out.zarr/labels/megaseg_mask/0/zarr.json",
        "out.measurements.parquet",
    ],
)
def test_what_a_finished_run_lost_is_made_again(lost, tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS)
    case.segment()
    path = next(p for p in (tmp_path / lost, tmp_path / f"out.zarr{lost[3:]}") if p.exists())
    written = path.read_bytes()
    path.unlink()
    case.assert_as_calm()
    assert path.read_bytes() == written
    assert case.segment().already_done


def scramble(path):
    path.write_bytes(path.read_bytes()[::-1])


def misspell(path):
    path.write_bytes(path.read_bytes().replace(b"s", b"z", 1))


@pytest.mark.parametrize("harm", [scramble, misspell])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_metadata_of_a_finished_run_that_changed_unseen_are_written_again(
    harm, version, tmp_path, tiny_bundle, tasks
):
    """Size and time say nothing: the documents are read."""
    options = {**OPTIONS, "ome_zarr": version, "outputs": "labels,scores,measurements"}
    case = Case(tmp_path, tiny_bundle, tasks, options, n_levels=2)
    case.segment()
    tasks.ran.clear()
    documents = [path for path in case.target.rglob("*") if path.name in METADATA]
    assert len(documents) > 6
    for path in documents:
        data = path.read_bytes()
        times = path.stat()
        harm(path)
        if path.read_bytes() == data:
            continue
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert not case.segment().already_done, path
        if harm is scramble:
            # Attributes of other names, as of a misspelt one, are not ours to remove.
            assert path.read_bytes() == data
    assert case.segment().already_done
    assert not tasks.ran


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("outputs", ["labels", "labels,scores,measurements"])
def test_damaged_metadata_of_ours_are_replaced(outputs, overwrite, tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, {**OPTIONS, "outputs": outputs})
    case.segment()
    case.settings = case.settings.model_copy(update={"overwrite": overwrite})
    documents = [path for path in case.target.rglob("*") if path.name in METADATA]
    assert len(documents) > 3
    for path in documents:
        truncate(path)
        case.assert_as_calm()


def test_nothing_is_removed_if_a_damaged_list_of_labels_is_not_ours_alone(
    tmp_path, tiny_bundle, tasks
):
    case = Case(tmp_path, tiny_bundle, tasks, {**OPTIONS, "outputs": "labels"})
    case.segment(case.source)
    truncate(case.source / "labels/zarr.json")
    before = contents(case.source)
    case.settings = case.settings.model_copy(update={"overwrite": True})
    with pytest.raises(TargetError, match=r"labels/zarr.json is damaged"):
        case.segment(case.source)
    assert contents(case.source) == before


def test_a_damaged_image_in_the_place_of_ours_is_not_overwritten(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS)
    case.segment()
    shutil.rmtree(case.target)
    shutil.copytree(case.source, case.target)
    truncate(case.target / "zarr.json")
    before = contents(case.target)
    case.settings = case.settings.model_copy(update={"overwrite": True})
    with pytest.raises(TargetError, match=r"zarr.json is damaged"):
        case.segment()
    assert contents(case.target) == before


def test_listings_of_a_plate_that_are_damaged_are_written_again(tmp_path, tiny_bundle):
    fields = {"A/1/0": FieldSpec(("dna",)), "A/2/0": FieldSpec(("dna",), (16, 32, 48))}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    settings = parse_settings({"model": str(tiny_bundle), **OPTIONS, "patch": "16,32,32"})

    def segment():
        return segment_here(str(source), str(tmp_path / "out.zarr"), settings)

    assert segment().status == "done"
    calm = contents(tmp_path / "out.zarr")
    for group in ("", "A", "A/2"):
        path = tmp_path / "out.zarr" / group / "zarr.json"
        scramble(path)
        assert not segment().already_done
        assert segment().already_done
        assert contents(tmp_path / "out.zarr") == calm


def rewrite(source):
    zarr.open_array(source / "0", mode="r+")[0, 0, 0] = 7


CHANGES = {
    "another chunk": rewrite,
    "one chunk less": lambda source: (source / "0/c/0/0/0").unlink(),
    "another time": lambda source: os.utime(source / "0/c/0/0/0", (0, 0)),
    "another array": lambda source: write_image(source / "other", blobs((4, 4, 4))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_since_is_not_already_done(change, tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS)
    case.segment()
    CHANGES[change](case.source)
    if change in ("another time", "another array"):
        assert case.segment().already_done
        return
    with pytest.raises(TargetError, match=r"were written or removed since .*--overwrite"):
        case.segment()
    if change == "another chunk":
        anew = case.settings.model_copy(update={"overwrite": True})
        where = str(case.source), str(case.target)
        assert segment_here(*where, anew).status == "done"
        assert case.segment().already_done
        moved = shutil.copytree(case.source, tmp_path / "moved.zarr")
        assert segment_here(str(moved), str(case.target), case.settings).already_done


@pytest.mark.parametrize(
    ("module", "step"),
    [(conclude, "undo_losses"), (publish, "withdraw"), (publish, "publish")],
)
def test_a_finished_run_that_is_interrupted_in_its_repair_goes_on(
    module, step, tmp_path, tiny_bundle, tasks, monkeypatch
):
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS)
    case.segment()
    (tmp_path / "out.zarr/labels/megaseg/zarr.json").unlink()
    original = getattr(module, step)

    def stop_after(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, step, stop_after)
        with pytest.raises(KeyboardInterrupt):
            case.segment()
    [found] = status(str(case.target))
    assert not found.done
    case.assert_as_calm()
    assert case.segment().already_done


def test_a_replaced_chunk_of_a_finished_run_is_made_again(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS)
    case.segment()
    path = tmp_path / "out.zarr/labels/megaseg/0/c/0/0/0"
    zero(path)
    case.assert_as_calm()
    assert case.segment().already_done


def test_what_is_lost_of_a_finished_run_is_told_by_a_check_and_by_the_report(
    tmp_path, tiny_bundle, tasks
):
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS)
    case.segment()
    target = str(case.target)
    moved = tmp_path / "moved.zarr"
    shutil.copytree(target, moved)
    shutil.copytree(f"{target}.run", f"{moved}.run")
    [found] = status(str(moved), checks_outputs=True)
    assert (found.exit_code, found.lost) == (0, "")
    shown = CliRunner().invoke(build_app(), ["status", str(moved), "--check"])
    assert "all that the run wrote is there" in shown.output
    (moved / "labels/megaseg/0/c/0/0/0").unlink()
    shown = CliRunner().invoke(build_app(), ["status", str(moved), "--check"])
    assert shown.exit_code == 3
    assert "not complete any more" in shown.output
    assert (
        "LOST what 1 task wrote was removed or changed since (volume 0, t=0 c=0 0:16,0:32,0:96). "
        "Run the same segment" in shown.output
    )
    page = (tmp_path / "moved.html").as_posix()
    write_report(str(moved), page)
    assert "what 1 task wrote was removed" in Path(page).read_text()
    (moved / "labels/megaseg/zarr.json").write_bytes(b"{}")
    shutil.copytree(f"{target}/labels/megaseg/0", moved / "labels/megaseg/0", dirs_exist_ok=True)
    [found] = status(str(moved), checks_outputs=True)
    assert found.lost == f"{moved}/labels/megaseg was removed or changed since it was written"


LOST = (
    "out.zarr.measurements.parquet",
    "out.zarr/tables/megaseg/zarr.json",
    "out.zarr/labels/megaseg/0/zarr.json",
    "out.zarr.run/megaseg/kept/0/0/logits/zarr.json",
)


def test_each_thing_that_is_lost_of_a_finished_run_is_named_and_made_again(
    tmp_path, tiny_bundle, tasks, cheap_engine
):
    options = {**OPTIONS, "outputs": "labels,scores,measurements", "keep_logits": True}
    case = Case(tmp_path, tiny_bundle, tasks, options)
    case.segment()
    again = parse_settings({"label_name": "again", "workers": 0})
    for name in LOST:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        [found] = status(str(case.target), checks_outputs=True)
        place = str(tmp_path / name).removesuffix("/zarr.json")
        assert found.lost == f"{place} was removed or changed since it was written"
        with pytest.raises(TargetError, match="first run its megaseg segment command again"):
            relabel(str(case.target), again)
        assert case.segment().status == "done"
        assert (tmp_path / name).read_bytes() == whole


READERS = {
    "evaluate": lambda labels, case: evaluate_images(Location.of(labels), Location.of(labels)),
    "where": lambda labels, case: case.segment_with(where=str(labels)),
    "regions": lambda labels, case: case.segment_with(
        regions=str(labels), outputs="labels,measurements"
    ),
    "open_image": lambda labels, case: open_image(labels)["0"].image.compute(),
}


@pytest.mark.parametrize("reader", READERS)
def test_lost_chunks_of_our_labels_are_no_background_to_any_reader(
    reader, tmp_path, tiny_bundle, tasks
):
    case = Case(tmp_path, tiny_bundle, tasks, OPTIONS)
    labels = tmp_path / "calm.zarr/labels/megaseg"
    READERS[reader](labels, case)
    (labels / "0/c/0/0/0").unlink()
    clear_array_cache()
    with pytest.raises((DataError, SourceError), match="0/c/0/0/0 was written but is missing now"):
        READERS[reader](labels, case)


@pytest.mark.parametrize("option", ["where", "regions"])
def test_labels_of_a_run_that_failed_in_part_are_no_mask(option, tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, {**OPTIONS, "block": "16,32,32"})

    def fail():
        raise ValueError("no")

    tasks.acts["segment", 1] = fail
    assert segment_here(str(case.source), str(case.target), case.settings).status == "failed"
    with pytest.raises((SettingsError, SourceError), match="lacks 1 part because tasks failed"):
        case.segment_with(
            outputs="labels,measurements", **{option: str(case.target / "labels/megaseg")}
        )


def test_join_publishes_nothing_that_is_lost(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS)
    record_plans(str(case.source), str(case.target), case.settings)
    plan = read_plan(str(case.target), "megaseg")
    for stage in plan.stages:
        run_tasks(plan, stage.name, range(stage.n_tasks))
    (case.target / "0/c/0/0/1").unlink()
    assert join_run(str(case.target), "megaseg") is None
    assert not run_tasks(plan, "segment", range(3)).failures
    assert join_run(str(case.target), "megaseg").status == "done"
    assert contents(case.target) == contents(tmp_path / "calm.zarr")


def test_records_of_what_was_written_are_small(tmp_path, tiny_bundle, tasks):
    case = Case(tmp_path, tiny_bundle, tasks, BLOCKS)
    case.stop_before("relabel")
    plan = read_plan(str(case.target), "megaseg")
    journal = Journal.read(plan)
    n_bytes = sum(path.stat().st_size for path in (case.run_folder / "journal").iterdir())
    assert n_bytes / journal.n_done < 300
    # In memory there is nothing of it.
    assert not any(s.wrote.kept for stage in plan.stages for s in journal.summaries(stage.name))
    assert undo_losses(plan, journal) == 0


@pytest.mark.slow
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("stage", ["cutoff", "holes-join", "join", "measurements", "downsample-1"])
def test_the_loss_of_each_kind_of_object(stage, harm, tmp_path, tiny_bundle, tasks):
    """Each object in turn is harmed before a resume: arrays and metadata equal the calm run."""
    level = blobs((16, 32, 300))
    case = Case(tmp_path, tiny_bundle, tasks, {**BLOCKS, "block": "16,32,100"}, level.shape)
    case.stop_before(stage)
    saved = tmp_path / "saved"
    saved.mkdir()
    for path in (case.target, case.run_folder.parent):
        shutil.copytree(path, saved / path.name)
    kinds = {}
    for path in case.objects():
        # One of each kind: names without their numbers.
        kind = "/".join(part for part in path.parts if not part.split(".")[0].isdigit())
        kinds.setdefault(kind, []).append(path)
    chance = random.Random(0)
    for paths in kinds.values():
        for path in (case.target, case.run_folder.parent):
            shutil.rmtree(path)
            shutil.copytree(saved / path.name, path)
        harm(chance.choice(paths))
        case.assert_as_calm()

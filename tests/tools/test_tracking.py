"""``megaseg track``: the table and the GEFF of a run, and what is refused."""

import io
import json
import shutil

import geff
import numpy as np
import pandas
import pytest
import zarr
from geff.core_io import read_to_memory
from geff.validate.data import ValidationConfig, validate_data
from ngio import open_ome_zarr_container
from numpy.testing import assert_array_equal
from typer.testing import CliRunner

from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.events import ignore
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import relabel
from megaseg_dask.run.target.tracks import tracks_at
from megaseg_dask.stores import Location
from megaseg_dask.tools.evaluate import find_tracks
from megaseg_dask.tools.tracking import track
from tests.fixtures.images import write_image
from tests.fixtures.movies import draw, simulate
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.runs import segment_here

UM = 0.5
SCALE = dict.fromkeys("zyx", UM)
MEASURED = "labels,scores,measurements"


@pytest.fixture
def segment_movie(tmp_path, tiny_bundle, cheap_engine):
    """Segment an image; what is bright becomes its objects."""

    def call(source, target="out.zarr", emit=ignore, n_failures=0, **options):
        options = {"model": str(tiny_bundle), "threads": 1, "overlap": 0, **options}
        options = {"outputs": MEASURED, **options}
        settings = parse_settings(options)
        result = segment_here(str(source), str(tmp_path / target), settings, emit=emit)
        assert len(result.failures) == n_failures
        return tmp_path / target

    return call


@pytest.fixture
def movie():
    """Balls of which one divides, and one vanishes; ids are those of tracks."""
    shape = (24, 24, 48)
    before = {1: np.array([12, 12, 8]), 2: np.array([12, 12, 24]), 3: np.array([12, 12, 40])}
    moved = {1: np.array([12, 12, 9]), 2: np.array([12, 12, 25])}
    apart = {1: np.array([12, 12, 9]), 4: np.array([12, 6, 25]), 5: np.array([12, 18, 25])}
    frames = [draw(shape, before, 5), draw(shape, moved, 5), draw(shape, apart, 4)]
    return np.stack(frames)


@pytest.fixture
def source(tmp_path, movie):
    image = np.where(movie > 0, 1000, 100).astype(np.uint16)
    return write_image(tmp_path / "movie.zarr", image, axes="tzyx", scale=SCALE)


def true_ids(target, movie, table):
    """The id in the movie of each row of a table."""
    labels = zarr.open_array(target / "labels/megaseg/0", mode="r")[...]
    found = []
    for t, label in zip(table.timepoint, table.label, strict=True):
        ids = movie[t][labels[t] == label]
        found.append(np.bincount(ids).argmax())
    return found


def valid_graph(path):
    """The graph of a GEFF that its own package calls valid."""
    geff.validate_structure(path)
    in_memory = read_to_memory(path)
    validate_data(in_memory, ValidationConfig(graph=True, tracklet=True, lineage=True))
    return geff.read(path)[0], in_memory["metadata"]


def test_the_table_and_the_graph_have_the_tracks(segment_movie, source, movie, tmp_path):
    target = segment_movie(source, block="24,24,24")
    file = tmp_path / "out.zarr.measurements.parquet"
    before = pandas.read_parquet(file)
    result = track(str(target))
    assert (result.failures, result.warnings) == ([], [])
    [tracked] = result.tracked
    assert (tracked.n_tracks, tracked.splits, tracked.objects) == (5, 1, 8)
    table = pandas.read_parquet(file)
    pandas.testing.assert_frame_equal(table[before.columns], before)
    assert len(set(zip(table.track_id, true_ids(target, movie, table), strict=True))) == 5
    parents = table[table.parent_track_id > 0]
    assert set(parents.timepoint) == {2}
    assert parents.parent_track_id.nunique() == 1
    assert table.lineage_id.nunique() == 3
    in_image = open_ome_zarr_container(target).get_table("megaseg").dataframe
    assert_array_equal(in_image.track_id, table.track_id)
    graph, metadata = valid_graph(tmp_path / "out.zarr.tracks/megaseg.geff")
    assert (graph.number_of_nodes(), graph.number_of_edges()) == (8, 5)
    places = np.array([[node["t"], node["z"]] for _, node in graph.nodes(data=True)])
    assert_array_equal(places[:, 0], table.timepoint)
    assert places[:, 1] == pytest.approx(table.centroid_z_um.to_numpy())
    [related] = metadata.related_objects
    labels = tmp_path / "out.zarr.tracks/megaseg.geff" / related.path
    assert labels.resolve() == (target / "labels/megaseg").resolve()


def test_a_second_track_replaces_the_first_and_a_new_run_removes_it(segment_movie, source):
    target = segment_movie(source)
    geff_of = target.parent / "out.zarr.tracks/megaseg.geff"
    assert track(str(target)).tracked[0].splits == 1
    [again] = track(str(target), splits=False, max_distance=0).tracked
    assert (again.splits, again.n_tracks, again.max_distance) == (0, 4, 0)
    table = pandas.read_parquet(target.parent / "out.zarr.measurements.parquet")
    assert list(table.columns[-3:]) == ["track_id", "parent_track_id", "lineage_id"]
    assert table.track_id.max() == 4
    valid_graph(geff_of)
    # The finished run stays finished, and keeps its tracks.
    segment_movie(source)
    assert geff_of.exists()
    segment_movie(source, overwrite=True, connectivity=3)
    assert not geff_of.exists()
    table = pandas.read_parquet(target.parent / "out.zarr.measurements.parquet")
    assert "track_id" not in table.columns


def test_labels_that_are_made_again_have_tracks_of_their_own(segment_movie, source):
    target = segment_movie(source)
    track(str(target))
    first = pandas.read_parquet(target.parent / "out.zarr.measurements.parquet")
    # Larger than those of the last timepoint.
    min_size = int(first.volume_voxels.nsmallest(3).max()) + 1
    options = {"label_name": "large", "min_size": min_size, "outputs": "labels,measurements"}
    relabel(str(target), parse_settings({**options, "workers": 0}))
    [tracked] = track(str(target), label_name="large").tracked
    assert tracked.objects == 5
    folder = target.parent / "out.zarr.tracks"
    assert sorted(path.name for path in folder.iterdir()) == ["large.geff", "megaseg.geff"]
    table = pandas.read_parquet(target.parent / "out.zarr.large.measurements.parquet")
    assert len(table.track_id) == 5
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(target.parent / "out.zarr.measurements.parquet"), first
    )


def test_each_field_of_a_plate_is_tracked(segment_movie, tmp_path):
    fields = {
        "A/1/0": FieldSpec(n_times=3, seed=1),
        "B/2/1": FieldSpec(n_times=3, seed=5),
        "B/3/0": FieldSpec(n_times=1, seed=9),
    }
    plate = write_fields(tmp_path / "plate.zarr", "0.4", fields)
    target = segment_movie(plate, channel="dna,actin", min_size=20)
    result = track(str(target))
    assert result.failures == []
    assert result.warnings == ["B/3/0: one timepoint, so there is nothing to track"]
    names = sorted(path.name for path in (tmp_path / "out.zarr.tracks").iterdir())
    suffixes = sorted({name.removeprefix("A_1_0_") for name in names[:2]})
    assert len(names) == 4
    assert names == sorted(f"{f}_{s}" for f in ("A_1_0", "B_2_1") for s in suffixes)
    table = pandas.read_parquet(tmp_path / "out.zarr.measurements.parquet")
    assert table[table.well == "B/3"].track_id.isna().all()
    tracks = table[table.well != "B/3"].groupby(["well", "channel"])
    for tracked, (_, rows) in zip(result.tracked, tracks, strict=True):
        assert rows.track_id.nunique() == tracked.n_tracks
        assert len(rows) == tracked.objects


def test_fields_that_failed_are_named_and_the_others_are_tracked(segment_movie, tmp_path):
    fields = {f"A/{n}/0": FieldSpec(n_times=2, seed=n) for n in (1, 2, 3, 4)}
    plate = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    chunks = plate / "A/2/0/0/c/1"
    next(path for path in chunks.rglob("*") if path.is_file()).write_bytes(b"no chunk")
    (plate / "A/3/0/zarr.json").unlink()
    target = segment_movie(plate, channel="dna", min_size=20, retries=0, n_failures=2)
    # What was lost since is no background.
    shutil.rmtree(target / "A/4/0/labels/megaseg/0/c/1")
    ended = CliRunner().invoke(build_app(), ["track", str(target), "--json"])
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    assert [failure.split(":")[0] for failure in found["failures"]] == ["A/3/0", "A/2/0", "A/4/0"]
    assert "is corrupt" in found["failures"][1]
    assert "was removed" in found["failures"][2]
    assert [path.name for path in (tmp_path / "out.zarr.tracks").iterdir()] == [
        "A_1_0_megaseg.geff"
    ]
    table = pandas.read_parquet(tmp_path / "out.zarr.measurements.parquet")
    assert set(table[table.track_id.notna()].well) == {"A/1"}
    assert set(table.well) == {"A/1", "A/2", "A/4"}


def test_objects_that_are_out_of_reach_are_said_and_not_guessed(segment_movie, tmp_path):
    shape = (24, 24, 64)
    frames = [draw(shape, {1: np.array([12, 12, x])}, 5) for x in (8, 9, 50)]
    frames.append(np.zeros(shape, np.uint32))
    image = np.where(np.stack(frames) > 0, 1000, 100).astype(np.uint16)
    write_image(tmp_path / "jump.zarr", image, axes="tzyx", scale=SCALE)
    target = segment_movie(tmp_path / "jump.zarr", min_size=20)
    result = track(str(target))
    assert [tracked.links for tracked in result.tracked] == [1]
    far, empty = result.warnings
    assert "no partner within" in far
    assert "after timepoint 1" in far
    assert "20.5 µm away" in far
    assert "no objects at timepoint 3" in empty


def test_what_cannot_be_tracked_is_refused_with_the_next_step(
    segment_movie, source, movie, tmp_path
):
    with pytest.raises(TargetError, match="no run is recorded"):
        track(str(tmp_path / "nothing.zarr"))
    flat = segment_movie(source, "one.zarr", time="0:1")
    with pytest.raises(SourceError, match="one timepoint"):
        track(str(flat))
    plain = segment_movie(source, "plain.zarr", outputs="labels,scores")
    with pytest.raises(SettingsError, match="has no measurements") as raised:
        track(str(plain))
    assert "--outputs labels,measurements" in str(raised.value)
    target = segment_movie(source)
    with pytest.raises(SettingsError, match="--max-distance -1"):
        track(str(target), max_distance=-1)
    file = target / "tables/megaseg/table.parquet"
    data = file.read_bytes()
    file.unlink()
    with pytest.raises(TargetError, match="run the same megaseg segment command again"):
        track(str(target))
    file.write_bytes(data)

    def stop(event):
        if event.kind == "progress":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment_movie(source, "begun.zarr", emit=stop)
    with pytest.raises(TargetError, match="is not finished; run the same megaseg segment"):
        track(str(tmp_path / "begun.zarr"))
    foreign = tmp_path / "out.zarr.tracks/megaseg.geff"
    zarr.open_group(foreign, mode="w", zarr_format=2).attrs["geff"] = {"directed": True}
    with pytest.raises(TargetError, match="did not write"):
        track(str(target))
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_tracks_are_compared_with_true_ones(segment_movie, source, movie, tmp_path):
    target = segment_movie(source)
    truth = write_image(tmp_path / "truth.zarr", movie, axes="tzyx", scale=SCALE)
    text = tmp_path / "man_track.txt"
    text.write_text("1 0 2 0\n2 0 1 0\n3 0 0 0\n4 2 2 2\n5 2 2 2\n")

    def evaluate(*words):
        words = ["evaluate", str(target), *map(str, words), "--unmarked", "--json"]
        ended = CliRunner().invoke(build_app(), words)
        return ended.exit_code, json.loads(ended.stdout)

    code, found = evaluate(truth, "--truth-tracks", text)
    assert code == 2
    assert "run megaseg track first" in found["error"]
    code, found = evaluate(truth, "--tracks", text)
    assert (code, "--truth-tracks" in found["error"]) == (2, True)
    track(str(target))
    code, found = evaluate(truth, "--truth-tracks", text)
    assert (code, found["tra"], found["lnk"], found["det"]) == (0, 1, 1, 1)
    text.write_text("1 0 2 0\n2 0 1 0\n3 0 0 0\n4 2 2 0\n5 2 2 2\n")
    _, found = evaluate(truth, "--truth-tracks", text)
    assert (found["missed_links"], found["wrong_links"]) == (0, 1)
    assert found["lnk"] == 1 - 1 / 6
    geff_of = tmp_path / "out.zarr.tracks/megaseg.geff"
    _, found = evaluate(target, "--truth-tracks", geff_of)
    assert (found["tra"], found["lnk"]) == (1, 1)
    # Comments and empty lines are no tracks.
    text.write_text("# L B E P\n1 0 2 0\n\n2 0 1 0\n3 0 0 0\n4 2 2 2\n5 2 2 2 # late\n")
    assert evaluate(truth, "--truth-tracks", text)[1]["tra"] == 1
    expects = "expected four integers (label, first and last timepoint, parent), found"
    for line in ("1 0 2", "label begin end parent", "1.5 0 2 0", f"{2**70} 0 2 0"):
        text.write_text(f"\n{line}\n1 0 2 0\n")
        code, found = evaluate(truth, "--truth-tracks", text)
        assert (code, found["error"]) == (2, f"{text}, line 2: {expects} '{line}'")
    code, found = evaluate(truth, "--truth-tracks", tmp_path)
    assert (code, "is a folder" in found["error"]) == (2, True)
    text.write_text("")
    assert "no track has the object 1 of" in evaluate(truth, "--truth-tracks", text)[1]["error"]
    # Tracks of other labels.
    segment_movie(source, "other.zarr", roi="0:24,0:24,0:30")
    track(str(tmp_path / "other.zarr"))
    words = ("--truth-tracks", geff_of, "--tracks", tmp_path / "other.zarr.tracks/megaseg.geff")
    code, found = evaluate(target, *words)
    assert code == 2
    assert "lack the object" in found["error"]


def test_tracks_of_a_field_are_found_beside_its_plate(tmp_path):
    plate = Location.of(write_fields(tmp_path / "p.zarr", "0.5", {"A/1/0": FieldSpec()}))
    labels = plate / "A/1/0/labels/megaseg"
    assert find_tracks(labels) == tracks_at(plate, "A/1/0", "megaseg")
    # A run of the field alone.
    own = plate / "A/1/0.tracks/megaseg.geff"
    (plate / "A/1/0.tracks").put("megaseg.geff/.zattrs", b"{}")
    assert find_tracks(labels) == own


def test_without_the_package_the_message_installs_it(monkeypatch, tmp_path):
    monkeypatch.setattr("megaseg_dask.ngff.tracks.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install .*(geff|tracks)"):
        track(str(tmp_path / "out.zarr"))


def test_the_command_tells_what_it_did(segment_movie, source):
    target = segment_movie(source)
    plain = CliRunner().invoke(build_app(), ["track", str(target)])
    assert plain.exit_code == 0
    assert "5 tracks of 8 objects, 1 split" in plain.output
    quiet = CliRunner().invoke(build_app(), ["track", str(target), "--merges", "--quiet", "--json"])
    assert '"n_tracks": 5' in quiet.stdout
    assert Location.of(target.parent / "out.zarr.tracks").children() == ["megaseg.geff"]


@pytest.mark.slow
def test_a_kill_leaves_whole_tables(segment_movie, source, monkeypatch):
    """Stopped at any write, tables can be read, and the same command finishes."""
    target = segment_movie(source)
    file = target.parent / "out.zarr.measurements.parquet"
    expected = pandas.read_parquet(file)
    put = Location.put
    n_done = 0

    def interrupted(self, key, data, **options):
        nonlocal n_done
        # Another thread writes that the lease is still held, whenever it is time.
        if "+lease" not in key:
            n_done += 1
            if n_done == n_allowed:
                raise KeyboardInterrupt
        put(self, key, data, **options)

    monkeypatch.setattr(Location, "put", interrupted)
    is_over = False
    n_allowed = 0
    while not is_over:
        n_allowed += 3
        n_done = 0
        try:
            track(str(target))
            is_over = True
        except KeyboardInterrupt:
            table = pandas.read_parquet(file)
            assert_array_equal(table.label, expected.label)
            rows = open_ome_zarr_container(target).get_table("megaseg").dataframe
            assert len(rows) == len(expected)
    assert n_allowed > 9
    assert "track_id" in pandas.read_parquet(file).columns
    valid_graph(target.parent / "out.zarr.tracks/megaseg.geff")


@pytest.mark.slow
def test_simulated_lineages_are_found_where_cells_move_little(segment_movie, tmp_path):
    movie = simulate(3, 8, step=0.5, seed=2)
    write_image(tmp_path / "cells.zarr", movie.image, axes="tzyx")
    target = segment_movie(tmp_path / "cells.zarr", min_size=20)
    [tracked] = track(str(target)).tracked
    assert (tracked.n_tracks, tracked.links) == (8, 16)


@pytest.mark.slow
def test_a_target_on_s3_gets_what_a_folder_gets(
    s3, bucket_folder, segment_movie, source, tiny_bundle, tmp_path
):
    local = segment_movie(source)
    track(str(local))
    target = f"{bucket_folder}/out.zarr"
    options = {"model": str(tiny_bundle), "threads": 1, "overlap": 0, "outputs": MEASURED}
    segment_here(str(source), target, parse_settings(options))
    for _ in range(2):
        [tracked] = track(target).tracked
    assert tracked.tracks == f"{target}.tracks/megaseg.geff"
    copy = tmp_path / "copy.geff"
    graph = Location.of(tracked.tracks)
    for key in graph.keys(""):
        (copy / key).parent.mkdir(parents=True, exist_ok=True)
        (copy / key).write_bytes(graph.get(key))
    found, metadata = valid_graph(copy)
    expected, _ = valid_graph(tmp_path / "out.zarr.tracks/megaseg.geff")
    assert (found.nodes(data=True), found.edges) == (expected.nodes(data=True), expected.edges)
    assert metadata.related_objects[0].path == "../../out.zarr/labels/megaseg"
    name = "out.zarr.measurements.parquet"
    table = pandas.read_parquet(io.BytesIO(Location.of(bucket_folder).get(name)))
    pandas.testing.assert_frame_equal(table, pandas.read_parquet(tmp_path / name))

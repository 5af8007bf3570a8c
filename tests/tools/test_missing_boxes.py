"""A block that failed is no background: what reads our outputs leaves it out, and says so."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from typer.testing import CliRunner

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.matching import evaluate
from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import TargetError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.target.provenance import missing_at
from megaseg_dask.stores import Location
from megaseg_dask.tools.evaluate import evaluate_images, find_labels
from megaseg_dask.tools.report.write import write_report
from megaseg_dask.tools.view.gallery import Gallery
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (16, 32, 96)
# The timepoint of the target, and the block with the last chunk of the source.
LOST = (1, Box((0, 0, 48), (16, 32, 96)))


@pytest.fixture
def targets(tmp_path, tiny_bundle, cheap_engine):
    """Two timepoints, segmented whole, and again with one block whose source is corrupt."""
    data = np.stack([blobs(SHAPE, seed) for seed in range(3)])
    source = write_image(tmp_path / "image.zarr", data, axes="tzyx", chunks=(1, 16, 32, 32))
    given = {
        "model": str(tiny_bundle),
        "engine": "torch",
        "threads": 1,
        "overlap": 0,
        "block": "16,32,48",
        "time": "1:3",
        "normalization": "1000,400",
        "retries": 0,
        "outputs": "labels,scores,measurements",
    }
    whole = tmp_path / "whole.zarr"
    assert segment_here(str(source), str(whole), parse_settings(given)).status == "done"
    (source / "0/c/2/0/0/2").write_bytes(b"corrupt")
    holed = tmp_path / "holed.zarr"
    result = segment_here(str(source), str(holed), parse_settings(given))
    assert result.status == "failed"
    return whole, holed


@pytest.mark.parametrize(
    "said",
    [
        {"missing_boxes": [{}]},
        {"missing_boxes": 3},
        {"normalization": [{"t": 0}], "missing_boxes": [{"t": 1, "level": 0}]},
    ],
)
def test_damaged_attributes_of_ours_are_named(said, tmp_path):
    image = write_image(tmp_path / "image.zarr", blobs(SHAPE))
    zarr.open_group(image).attrs["megaseg"] = said
    with pytest.raises(TargetError, match=r"image\.zarr: .* are damaged"):
        missing_at(Location.of(image))


def test_evaluate_leaves_out_what_is_missing(targets):
    whole, holed = targets
    assert missing_at(find_labels(str(holed))) == [LOST]
    ids = [zarr.open_array(target / "labels/megaseg/0")[...] for target in (holed, whole)]
    t, box = LOST
    is_there = np.ones(ids[0].shape, bool)
    is_there[(t, *box.slices)] = False
    # Ids of another timepoint are other objects.
    ids = [labels + np.arange(2)[:, None, None, None] * 1000 * (labels > 0) for labels in ids]
    expected = evaluate(*(labels[is_there] for labels in ids))
    for block in [SHAPE, (7, 13, 31)]:
        found = evaluate_images(find_labels(str(holed)), find_labels(str(whole)), block)
        assert found.left_out_voxels == box.size
        assert (found.dice, found.n_true) == (expected.dice, expected.n_true)
        assert found.matchings == expected.matchings


def test_what_reads_the_outputs_says_what_is_missing(targets):
    whole, holed = targets
    done = CliRunner().invoke(build_app(), ["evaluate", str(holed), str(whole), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["left_out_voxels"] == LOST[1].size
    assert f"(missing_boxes): {LOST[1].size} voxels" in done.stderr
    box = {"t": 2, "c": 0, "level": 0, "start": [0, 0, 48], "stop": [16, 32, 96]}
    table = zarr.open_group(holed / "tables/megaseg", mode="r")
    assert table.attrs["megaseg"]["missing_boxes"] == [box]
    metadata = pq.read_schema(f"{holed}.measurements.parquet").metadata
    assert json.loads(metadata[b"missing_boxes"]) == [box]
    layers = [layer.name for layer in Gallery(str(holed)).scene("").layers]
    assert "labels megaseg (1 block missing)" in layers
    page = Location.of(write_report(str(holed)).url)
    assert b"beside blocks that failed are cut" in page.parent.get(page.basename)


def test_with_nothing_left_there_is_no_score(targets, tmp_path):
    whole, holed = targets
    group = zarr.open_group(holed / "labels/megaseg", mode="r+")
    provenance = dict(group.attrs["megaseg"])
    whole_box = {"c": 0, "level": 0, "start": [0, 0, 0], "stop": list(SHAPE)}
    provenance["missing_boxes"] = [{"t": t, **whole_box} for t in (1, 2)]
    group.attrs["megaseg"] = provenance
    done = CliRunner().invoke(build_app(), ["evaluate", str(holed), str(whole)])
    assert done.exit_code == 2
    assert "lacks all voxels" in done.stderr

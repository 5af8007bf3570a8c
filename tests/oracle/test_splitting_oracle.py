"""Objects taken apart by blocks equal a loop over the whole label image, id for id."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy.ndimage import distance_transform_edt, find_objects
from skimage.measure import label
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.splitting import padded_voxels, split_object
from megaseg_dask.plan.plan import Output
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.state import VolumeState
from megaseg_dask.run.tasks.functions import run_on_output
from megaseg_dask.run.workspace import MemoryWorkspace, Workspace
from tests.fixtures.images import blobs, write_image
from tests.laws.test_labels import snake, survivors

SHAPE = (18, 22, 26)
BLOCKS = [SHAPE, (7, 9, 10), (18, 6, 26)]
OUTPUT = Output(0)


def split_whole(mask, connectivity, depth_um, spacing_um, min_size=0, max_voxels=np.inf):
    """Label a whole mask and split each of its objects; ids follow the first voxels."""
    whole = label(mask, connectivity=connectivity)
    parts = whole.astype(np.int64)
    for number, box in enumerate(find_objects(whole), 1):
        padding = [
            (int(side.start > 0), int(side.stop < extent))
            for side, extent in zip(box, mask.shape, strict=True)
        ]
        one = np.pad(whole[box] == number, padding)
        limits = [[side.start for side in box] + [side.stop for side in box]]
        if one.all() or padded_voxels(np.array(limits))[0] > max_voxels:
            continue
        distance = distance_transform_edt(one, sampling=spacing_um).astype(np.float32)
        markers, n_markers = label(h_maxima(distance, depth_um), connectivity=3, return_num=True)
        if n_markers < 2:
            continue
        found = watershed(-distance, markers, mask=one)
        if (found[one] == 0).any():
            found = watershed(-distance, found, mask=one, connectivity=3)
        unpadded = found[
            tuple(
                slice(before, before + n)
                for (before, _), n in zip(padding, whole[box].shape, strict=True)
            )
        ]
        parts[box] = np.where(whole[box] == number, parts.max() + unpadded, parts[box])
    ids, first = np.unique(parts, return_index=True)
    first, ids = first[ids > 0], ids[ids > 0]
    table = np.zeros(parts.max() + 1, np.int64)
    table[ids[np.argsort(first)]] = np.arange(1, len(ids) + 1)
    return survivors(table[parts], min_size)


@st.composite
def masks(draw) -> np.ndarray:
    """Balls that touch, also at the border of the volume; noise, and long objects."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = np.zeros(SHAPE, bool)
    grid = np.indices(SHAPE)
    for _ in range(draw(st.integers(0, 14))):
        center = rng.uniform(0, SHAPE)
        radius = rng.uniform(1, 7)
        mask |= sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True)) < radius**2
    if draw(st.booleans()):
        mask |= snake(SHAPE, rng)
    noise = draw(st.sampled_from([0.0, 0.02, 1.0]))
    return mask | (rng.random(SHAPE) < noise)


class InMemory(MemoryWorkspace):
    """A workspace of several blocks that writes nothing."""

    def write(self, kind, output, box, values, level=0) -> None:
        key = (kind, output, level)
        whole = self._arrays.setdefault(key, np.zeros(SHAPE, values.dtype))
        whole[box.slices] = values


@pytest.fixture(scope="module")
def plans(tmp_path_factory, tiny_bundle):
    folder = tmp_path_factory.mktemp("splitting")
    source = write_image(folder / "image.zarr", blobs(SHAPE))
    found = []
    for block in BLOCKS:
        options = {"model": str(tiny_bundle), "threads": 1, "split": "distance", "block": block}
        target = str(folder / "out.zarr")
        [(plan, _)] = plan_runs(str(source), target, parse_settings(options))
        found.append(plan)
    return found


def split_by_blocks(plan, mask, missing=(), **resolved) -> tuple[np.ndarray, list]:
    """The stages from ``label`` to ``relabel``, and what each of them told."""
    plan = plan.with_block(plan.block_shape)
    plan = plan.model_copy(update={"resolved": replace(plan.resolved, **resolved)})
    workspace = InMemory(Workspace(plan))
    workspace.set_state(VolumeState(missing=tuple(missing)))
    workspace.write("mask", OUTPUT, Box.of(SHAPE), mask.astype(np.uint8))
    workspace.write("labels", OUTPUT, Box.of(SHAPE), np.zeros(SHAPE, np.uint32))
    workspace.write("fragments", OUTPUT, Box.of(SHAPE), np.zeros(SHAPE, np.uint32))
    told = []
    for stage in plan.staged:
        if stage.name not in ("label", "seams", "join", "split", "rank", "relabel"):
            continue
        skipped = missing if stage.skips_missing else ()
        told += [
            run_on_output(workspace, stage, OUTPUT, number)
            for number in range(stage.per_volume)
            if number not in skipped
        ]
    return workspace.array("labels", OUTPUT).read(Box.of(SHAPE)), told


@settings(max_examples=40, deadline=None)
@given(
    masks(),
    st.sampled_from(range(len(BLOCKS))),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0.1, 0.3, 0.75, 2.0]),
    st.sampled_from([0, 0, 1, 30]),
)
@example(np.ones(SHAPE, bool), 1, 1, 0.1, 0)
@example(np.zeros(SHAPE, bool), 1, 1, 0.1, 0)
def test_any_blocks_split_as_the_whole(plans, mask, number, connectivity, depth_um, min_size):
    plan = plans[number]
    found, told = split_by_blocks(
        plan, mask, connectivity=connectivity, split_depth=depth_um, min_size=min_size
    )
    spacing_um = plan.target_image.spacing_um
    expected = split_whole(mask, connectivity, depth_um, spacing_um, min_size)
    assert_array_equal(found, expected)
    [n_objects] = [state.n_objects for state in told if state.n_objects is not None]
    assert n_objects == expected.max()


@settings(max_examples=15, deadline=None)
@given(masks(), st.sampled_from([1, 3]), st.sets(st.integers(0, 26), max_size=8))
def test_missing_blocks_count_as_background(plans, mask, connectivity, missing):
    plan = plans[1]
    gone = np.zeros(SHAPE, bool)
    for number in missing:
        gone[plan.block_grid()[number].slices] = True
    found, _ = split_by_blocks(
        plan, mask, missing, connectivity=connectivity, split_depth=0.3, min_size=2
    )
    spacing_um = plan.target_image.spacing_um
    assert_array_equal(found, split_whole(mask & ~gone, connectivity, 0.3, spacing_um, 2))


@settings(max_examples=15, deadline=None)
@given(masks(), st.sampled_from(range(len(BLOCKS))), st.integers(30, 3000))
def test_an_object_that_does_not_fit_is_left_whole_and_named(plans, mask, number, max_voxels):
    plan = plans[number].with_split(max_voxels)
    found, told = split_by_blocks(plan, mask, split_depth=0.3, min_size=3)
    spacing_um = plan.target_image.spacing_um
    assert_array_equal(found, split_whole(mask, 1, 0.3, spacing_um, 3, max_voxels))
    for object_id, *limits in chain.from_iterable(state.whole for state in told):
        start, stop = limits[:3], limits[3:]
        here = np.argwhere(found == object_id)
        assert_array_equal(here.min(axis=0), start)
        assert_array_equal(here.max(axis=0) + 1, stop)


@pytest.mark.parametrize("spacing_um", [(1, 1, 1), (0.29, 0.108333, 0.108333)])
def test_the_padding_of_one_voxel_is_as_good_as_the_whole_volume(spacing_um):
    """Distances are those in the whole volume, and so are the parts."""
    mask = np.zeros((24, 40, 44), bool)
    grid = np.indices(mask.shape)
    for center in ((6, 9, 9), (6, 9, 22), (18, 30, 30), (0, 30, 6), (0, 30, 18)):
        mask |= sum((a - c) ** 2 for a, c in zip(grid, center, strict=True)) < 49
    whole = label(mask)
    n_split = 0
    for number, box in enumerate(find_objects(whole), 1):
        one = whole == number
        at_end = [
            (side.start == 0, side.stop == n) for side, n in zip(box, mask.shape, strict=True)
        ]
        found = split_object(one[box], at_end, spacing_um, 0.3)
        distance = distance_transform_edt(one, sampling=spacing_um).astype(np.float32)
        markers, n_markers = label(h_maxima(distance, 0.3), connectivity=3, return_num=True)
        if n_markers < 2:
            assert found is None
            continue
        n_split += 1
        assert_array_equal(found, watershed(-distance, markers, mask=one)[box])
    assert n_split == 2

"""The plain way: a dense table, an assignment solver, and scikit-image where it has the measure."""

import numpy as np
import pytest
import tifffile
from ctc_metrics.metrics import det, seg
from ctc_metrics.utils.representations import count_acyclic_graph_correction_operations, match
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment
from skimage.measure import label
from skimage.metrics import contingency_table
from skimage.segmentation import relabel_sequential

from megaseg_dask.algorithms.matching import THRESHOLDS, Contingency, evaluate, evaluate_contingency


def dense_ious(predicted, true):
    predicted, true = relabel_sequential(predicted)[0], relabel_sequential(true)[0]
    table = np.zeros((predicted.max() + 1, true.max() + 1), int)
    np.add.at(table, (predicted.ravel(), true.ravel()), 1)
    union = table.sum(1, keepdims=True) + table.sum(0) - table
    return (table / np.maximum(union, 1))[1:, 1:]


def assigned(ious, threshold):
    """IoUs of the assignment that has the most pairs at the threshold, then the highest IoU."""
    n = min(ious.shape)
    if n == 0:
        return np.empty(0)
    pairs = linear_sum_assignment((ious >= threshold) + ious / (2 * n), maximize=True)
    return ious[pairs][ious[pairs] >= threshold]


def check(predicted, true):
    found, ious = evaluate(predicted, true), dense_ious(predicted, true)
    n_predicted, n_true = ious.shape
    assert (found.n_predicted, found.n_true) == ious.shape
    precisions = []
    for matching, threshold in zip(found.matchings, THRESHOLDS, strict=True):
        n = len(assigned(ious, threshold))
        counts = (matching.true_positives, matching.false_positives, matching.false_negatives)
        assert counts == (n, n_predicted - n, n_true - n)
        precisions.append(n / (n_predicted + n_true - n) if n else 0)
        assert matching.average_precision == precisions[-1]
    assert found.mean_average_precision == pytest.approx(np.mean(precisions))
    matched = assigned(ious, 0.5)
    quality = matched.sum() / ((n_predicted + n_true) / 2) if matched.size else 0
    assert found.panoptic_quality == pytest.approx(quality)
    p, t = predicted > 0, true > 0
    shared = (p & t).sum()
    assert found.dice == pytest.approx(2 * shared / max(p.sum() + t.sum(), 1))
    assert found.iou == pytest.approx(shared / max((p | t).sum(), 1))
    assert found.precision == pytest.approx(shared / max(p.sum(), 1))
    assert found.recall == pytest.approx(shared / max(t.sum(), 1))


@st.composite
def label_images(draw):
    """Two label images.

    The second is noise, or the first with some voxels changed or halves renamed.
    """
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=7))
    few = hnp.arrays(np.int32, shape, elements=st.integers(0, draw(st.integers(1, 9))))
    predicted, other = draw(few), draw(few)
    keep = np.random.default_rng(draw(st.integers(0, 99))).random(shape) < draw(st.floats(0, 1))
    return predicted, np.where(keep, predicted, other * draw(st.sampled_from([1, 3, 1000])))


@given(label_images())
@settings(max_examples=100, deadline=None)
def test_equals_the_dense_table_and_the_assignment_solver(images):
    check(*images)


@pytest.mark.parametrize("seed", range(5))
def test_equals_them_on_blobs_cut_in_halves(seed):
    rng = np.random.default_rng(seed)
    true = np.kron(rng.integers(0, 6, (4, 4, 4)), np.ones((4, 4, 4), int))
    predicted = true.copy()
    predicted[:, 2::4] += 100 * (predicted[:, 2::4] > 0)
    predicted[:, 3::4] += 100 * (predicted[:, 3::4] > 0)  # exact halves: IoU 0.5 twice
    check(predicted, true)
    check(label(predicted, connectivity=1), label(true, connectivity=1))


@given(label_images())
@settings(max_examples=100, deadline=None)
def test_the_table_is_scikit_images(images):
    predicted, true = images
    table, theirs = Contingency.of(predicted, true), contingency_table(predicted, true).tocoo()
    ours = zip(table.predicted.tolist(), table.true.tolist(), table.voxels.tolist(), strict=True)
    assert set(ours) == set(
        zip(theirs.row.tolist(), theirs.col.tolist(), theirs.data.tolist(), strict=True)
    )


@pytest.mark.parametrize("seed", range(4))
def test_seg_and_det_are_those_of_the_cell_tracking_challenge(seed, tmp_path):
    """Objects of several timepoints that are missed, merged, cut and made up."""
    rng = np.random.default_rng(seed)
    true = np.kron(rng.integers(0, 7, (3, 4, 4, 4)), np.ones((1, 4, 4, 4), int))
    predicted = true.copy()
    predicted[predicted == 2] = 1
    predicted[:, :, 2::4] += 10 * (predicted[:, :, 2::4] > 0)
    predicted[:, 3::4] = 0
    predicted[rng.random(true.shape) < 0.1] = 5
    files = []
    for name, images in (("true", true), ("predicted", predicted)):
        files.append([tmp_path / f"{name}{t}.tif" for t in range(3)])
        for file, ids in zip(files[-1], images, strict=True):
            tifffile.imwrite(file, ids.astype(np.int64))
    each = [match(str(ours), str(theirs)) for ours, theirs in zip(*files, strict=True)]
    labels_true, labels_predicted, mapped_true, mapped_predicted, ious = zip(*each, strict=True)
    graph = count_acyclic_graph_correction_operations(
        None, None, labels_true, labels_predicted, mapped_true, mapped_predicted
    )
    tables = [Contingency.of(*pair) for pair in zip(predicted, true, strict=True)]
    found = evaluate_contingency(Contingency.joined(tables))
    assert found.seg == pytest.approx(seg(labels_true, ious))
    assert found.det == pytest.approx(det(**graph))
    assert 0 < found.det < 1

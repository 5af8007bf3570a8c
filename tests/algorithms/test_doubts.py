"""Sums that tell whether a segmentation can be believed, against NumPy on all voxels."""

from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.filters import threshold_otsu

from megaseg_dask.algorithms.blending import sigmoid
from megaseg_dask.algorithms.doubts import (
    OUTLIER_Z,
    SPECK_VOXELS,
    ObjectSizes,
    bimodality,
    robust_z,
    z_of_counts,
    z_of_shares,
)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 200)), max_size=30),
    st.integers(0, 100),
)
def test_sizes_are_those_of_whole_objects(fragments, min_size):
    ids = np.array([label for label, _ in fragments], np.uint32)
    sizes = np.array([size for _, size in fragments], np.uint64)
    # Ids are without gaps.
    found = np.unique(ids[ids > 0])
    ids = np.where(ids > 0, np.searchsorted(found, ids) + 1, 0).astype(np.uint32)
    of_objects = [int(sizes[ids == label].sum()) for label in range(1, len(found) + 1)]
    specks = [size for size in of_objects if size < SPECK_VOXELS]
    others = sorted(size for size in of_objects if size >= SPECK_VOXELS)[:-1]
    assert ObjectSizes.of(ids, sizes, min_size) == ObjectSizes(
        foreground=int(sizes.sum()),
        largest=max(of_objects, default=0),
        n_specks=len(specks),
        in_specks=sum(specks),
        n_near=sum(size < 2 * min_size for size in of_objects),
        others=sum(others),
        typical=int(median(others)) if others else 0,
    )


@pytest.mark.parametrize("share", [0.02, 0.3])
def test_bimodality_is_the_variance_between_the_classes_of_otsu(share):
    rng = np.random.default_rng(0)
    above = rng.random(100_000) < share
    logits = np.where(above, rng.normal(3, 1.5, above.size), rng.normal(-4, 2, above.size))
    logits = logits.astype(np.float32)
    counts, edges = np.histogram(logits, 256)
    # Binned as the histogram is: what lies between two centers is in one bin.
    centers = (edges[:-1] + edges[1:]) / 2
    scores = np.repeat(sigmoid(centers.astype(np.float32)), counts)
    mask = scores > threshold_otsu(scores, nbins=2**16)
    means = np.where(mask, scores[mask].mean(), scores[~mask].mean())
    expected = means.var() / scores.var()
    assert bimodality(counts, edges[0], edges[-1]) == pytest.approx(expected, rel=1e-3)


def test_two_peaks_and_one_value():
    counts = np.zeros(256, np.int64)
    counts[[0, 255]] = 5, 7
    assert bimodality(counts, -90, 90) == pytest.approx(1)
    counts[255] = 0
    assert bimodality(counts, -90, 90) == 0.0


def test_a_few_volumes_have_no_outliers():
    assert robust_z(np.array([1, 1, 100.0]), 1).tolist() == [0, 0, 0]
    assert robust_z(np.array([10, 11, 9, 10, 12, 10, 8, 100.0]), 1).argmax() == 7
    # Most are equal: what differs by chance is no outlier.
    assert np.abs(z_of_counts(np.array([4.0] * 8 + [7]))).max() < OUTLIER_Z
    assert np.abs(z_of_counts(np.array([4.0] * 8 + [40]))).max() > OUTLIER_Z
    shares = np.array([0.05, 0.06, 0.08, 0.09, 0.1, 0.06, 0.07, 0.003])
    assert (np.abs(z_of_shares(shares)) > OUTLIER_Z).tolist() == [False] * 7 + [True]

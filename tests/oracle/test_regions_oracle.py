"""Objects in regions, from sums of blocks, against NumPy and scikit-image on whole volumes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.algorithms.geometry import BlockGrid, Box
from megaseg_dask.algorithms.measurements import measure_block, merge, to_columns
from megaseg_dask.algorithms.regions import (
    RegionSums,
    columns_of_objects,
    columns_of_regions,
    measure_distances,
    measure_regions,
    merge_regions,
    object_columns,
    to_region_columns,
)
from tests.fixtures.images import with_border

SPACING = (0.5, 0.25, 0.2)


def measure(labels, regions, image, block_shape):
    parts = []
    sums = []
    for core in BlockGrid(labels.shape, block_shape):
        around, channels = with_border(labels, image, core)
        sums.append(measure_block(around, channels, core))
        parts.append(measure_regions(around, with_border(regions, image, core)[0], channels, core))
    of_regions = merge_regions(parts)
    stored = RegionSums.from_arrays(of_regions.arrays())
    return merge(sums), stored


def region_of(inside, sizes_of_regions):
    """The region with most of the voxels, the smallest of several; and how many these are."""
    counts = {r: int((inside == r).sum()) for r in sizes_of_regions if (inside == r).any()}
    if not counts:
        return 0, 0
    most = max(counts.values())
    return min(r for r, n in counts.items() if n == most), most


def distance_of(voxels, regions, region):
    """From the centroid to the nearest of all voxels outside the region."""
    outside = np.argwhere(regions != region)
    if not region or not len(outside):
        return np.nan
    centroid = voxels.mean(axis=0)
    if regions[tuple(np.rint(centroid).astype(int))] != region:
        return 0.0
    return np.sqrt(np.square((outside - centroid) * SPACING).sum(axis=1)).min()


@given(data=st.data(), block_shape=st.tuples(*[st.integers(1, 6)] * 3))
def test_regions_at_any_block(data, block_shape):
    shape = data.draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=6))
    labels = data.draw(hnp.arrays(np.uint32, shape, elements=st.integers(0, 4)))
    dtype = data.draw(st.sampled_from(["u1", "u2", "i4", "u8"]))
    regions = data.draw(hnp.arrays(dtype, shape, elements=st.sampled_from([0, 1, 2, 3, 100])))
    image = data.draw(hnp.arrays("u2", shape))
    sums, of_regions = measure(labels, regions, image, block_shape)
    ids = [int(r) for r in np.unique(regions) if r]
    distances = measure_distances(sums, of_regions, lambda box: regions[box.slices], shape, SPACING)
    of_objects = columns_of_objects(sums, of_regions.overlaps, distances)
    assert list(of_objects) == list(object_columns(size_is_known=True))
    expected = [region_of(regions[labels == label], ids) for label in sums.label]
    assert of_objects["region"].tolist() == [region for region, _ in expected]
    shares = [n / size for (_, n), size in zip(expected, sums.n_voxels, strict=True)]
    assert of_objects["region_share"].tolist() == shares
    for row, label in enumerate(sums.label):
        far = distance_of(np.argwhere(labels == label), regions, expected[row][0])
        assert_allclose(distances[row], far, rtol=1e-12)
    table = to_region_columns(of_regions, of_objects["region"], shape, SPACING)
    assert list(table) == list(columns_of_regions(size_is_known=True))
    assert table["label"].tolist() == ids
    whole = measure_block(np.pad(regions, 1).astype(np.uint64), image[None], Box.of(shape))
    for name, values in to_columns(whole, shape, SPACING).items():
        assert_array_equal(table[name], values)
    inside = [(regions == r) & (labels > 0) for r in ids]
    assert table["structure_voxels"].tolist() == [mask.sum() for mask in inside]
    assert_allclose(table["structure_um3"], table["structure_voxels"] * 0.5 * 0.25 * 0.2)
    sizes = np.array([(regions == r).sum() for r in ids])
    assert_allclose(table["structure_share"], table["structure_voxels"] / sizes)
    sums_inside = [float(image[mask].sum(dtype=np.int64)) for mask in inside]
    assert table["structure_intensity_sum"].tolist() == sums_inside
    n_objects = [sum(region == r for region, _ in expected) for r in ids]
    assert table["n_objects"].tolist() == n_objects


def test_without_a_voxel_size_there_is_no_volume():
    known = columns_of_regions(size_is_known=True)
    unknown = columns_of_regions(size_is_known=False)
    left_out = set(known) - set(unknown)
    assert {"structure_um3", "volume_um3", "surface_area_um2", "sphericity"} <= left_out
    assert "structure_share" in unknown


def test_a_region_that_is_too_large_has_no_distance():
    regions = np.zeros((20, 20, 20), np.uint16)
    regions[1:19, 1:19, 1:19] = 3
    labels = np.zeros(regions.shape, np.uint32)
    labels[9:12, 9:12, 9:12] = 1
    sums, of_regions = measure(labels, regions, labels.astype(np.uint16), (7, 8, 9))

    def far(max_voxels):
        [distance] = measure_distances(
            sums,
            of_regions,
            lambda box: regions[box.slices],
            regions.shape,
            SPACING,
            max_voxels=max_voxels,
        )
        return distance

    # The centroid is at 10, and 19 is outside.
    assert_allclose(far(8000), 9 * 0.2)
    assert np.isnan(far(7999))


def test_a_centroid_between_two_voxels_rounds_by_its_place_in_the_volume():
    labels = np.array([[[0, 1, 1]]], np.uint32)
    regions = np.array([[[0, 0, 1]]], np.uint8)
    sums, of_regions = measure(labels, regions, labels.astype(np.uint16), (1, 1, 1))
    far = measure_distances(
        sums, of_regions, lambda box: regions[box.slices], labels.shape, SPACING
    )
    # 1.5 is 2, the even one, which is inside.
    assert_allclose(far, 0.1)

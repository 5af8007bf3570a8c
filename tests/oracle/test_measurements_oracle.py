"""Merged measurements of blocks against ``regionprops_table`` of the whole volume."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from skimage.measure import label, marching_cubes, mesh_surface_area, regionprops_table

from megaseg_dask.algorithms.geometry import BlockGrid
from megaseg_dask.algorithms.measurements import measure_block, merge, to_columns
from tests.fixtures.images import blobs, with_border

SPACING = (0.5, 0.25, 0.2)

PROPERTIES = (
    "label",
    "area",
    "centroid",
    "bbox",
    "intensity_mean",
    "intensity_min",
    "intensity_max",
    "intensity_std",
)
PROPERTIES_UM = (
    "area",
    "centroid",
    "extent",
    "equivalent_diameter_area",
    "axis_major_length",
    "axis_minor_length",
    "inertia_tensor_eigvals",
)


def measure_split(labels, image, block_shape):
    parts = (
        measure_block(*with_border(labels, image, c), c)
        for c in BlockGrid(labels.shape, block_shape)
    )
    return to_columns(merge(parts), labels.shape, SPACING)


def assert_agrees(labels, image, block_shape):
    found = measure_split(labels, image, block_shape)
    # In float64: scikit-image takes mean and standard deviation in the image's own precision.
    exact = image.astype(np.float64)
    expected = regionprops_table(labels.astype(np.int64), exact, properties=PROPERTIES)
    in_um = regionprops_table(labels.astype(np.int64), properties=PROPERTIES_UM, spacing=SPACING)
    assert_array_equal(found["label"], expected["label"])
    assert_array_equal(found["volume_voxels"], expected["area"])
    assert_allclose(found["volume_um3"], in_um["area"], rtol=1e-12)
    for i, axis in enumerate("zyx"):
        assert_allclose(found[f"centroid_{axis}"], expected[f"centroid-{i}"], rtol=1e-12)
        assert_allclose(found[f"centroid_{axis}_um"], in_um[f"centroid-{i}"], rtol=1e-12)
        assert_array_equal(found[f"bbox_{axis}_start"], expected[f"bbox-{i}"])
        assert_array_equal(found[f"bbox_{axis}_stop"], expected[f"bbox-{i + 3}"])
    assert_agrees_in_shape(found, in_um, labels)
    assert_array_equal(found["intensity_min"], expected["intensity_min"])
    assert_array_equal(found["intensity_max"], expected["intensity_max"])
    # numpy's own rounding of a mean and its deviations is what limits the comparison.
    scale = 1e-12 * np.maximum(np.abs(found["intensity_min"]), np.abs(found["intensity_max"]))
    for name in ("intensity_mean", "intensity_std"):
        assert (np.abs(found[name] - expected[name]) <= scale).all()
    assert_allclose(
        found["intensity_sum"], expected["intensity_mean"] * expected["area"], rtol=1e-12, atol=1e-6
    )


def assert_agrees_in_shape(found, in_um, labels):
    assert_allclose(found["extent"], in_um["extent"], rtol=1e-12)
    assert_allclose(found["equivalent_diameter_um"], in_um["equivalent_diameter_area"], rtol=1e-12)
    # scikit-image's rounding of flat objects is what limits the comparison.
    near = {"rtol": 1e-6, "atol": 1e-6}
    assert_allclose(found["axis_major_um"], in_um["axis_major_length"], **near)
    assert_allclose(found["axis_minor_um"], in_um["axis_minor_length"], **near)
    first, second, third = (in_um[f"inertia_tensor_eigvals-{i}"] for i in range(3))
    middle = np.sqrt(np.maximum(10 * (first - second + third), 0))
    assert_allclose(found["axis_middle_um"], middle, **near)
    surfaces = [surface_of(np.pad(labels == label, 1)) for label in found["label"]]
    assert_allclose(found["surface_area_um2"], surfaces, rtol=1e-6)
    balls = np.cbrt(36 * np.pi * np.square(found["volume_um3"]))
    assert_allclose(found["sphericity"], balls / surfaces, rtol=1e-6)


def surface_of(mask):
    vertices, faces, _, _ = marching_cubes(mask.astype(float), 0.5, spacing=SPACING)
    return mesh_surface_area(vertices, faces)


# What the blobs, up to about 2800, are multiplied with.
FACTORS = {
    "u1": 0.08,
    "i1": -0.04,
    "u2": 20.0,
    "i2": -10.0,
    "u4": 1e6,
    "i4": -5e5,
    "f4": -0.37,
    "f8": 1e-3,
}


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("block_shape", [(40, 60, 70), (16, 16, 16), (7, 60, 11), (1, 13, 70)])
def test_blobs(dtype, block_shape):
    image = blobs((40, 60, 70))
    labels = label(image > 1200, connectivity=1).astype(np.uint32)
    assert labels.max() > 20
    assert_agrees(labels, (image * FACTORS[dtype]).astype(dtype), block_shape)


@given(
    st.data(),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from(["u1", "u2", "i2", "u4", "f4"]),
)
def test_any_labels(data, block_shape, dtype):
    shape = data.draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=6))
    labels = data.draw(hnp.arrays(np.uint32, shape, elements=st.integers(0, 4)))
    elements = st.floats(-1e4, 1e4, width=32) if dtype == "f4" else None
    image = data.draw(hnp.arrays(dtype, shape, elements=elements))
    if labels.any():
        assert_agrees(labels, image, block_shape)

"""Engines against float32 PyTorch: any network that a bundle may hold, at any patch that it takes.

Networks are small and random: strides, kernels, paddings and levels are what a conversion may get
wrong.
"""

import numpy as np
import openvino
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from megaseg_dask.inference.conversion import convert
from megaseg_dask.models import NetworkSpec
from megaseg_dask.models.build import build_network, fit_weights
from megaseg_dask.models.bundle import Bundle
from tests.fixtures.bundles import one_thread, seeded_network

MAX_VOXELS = 100_000


def network(strides, kernels, res_block=True, in_channels=1):
    strides = ((1, 1, 1), *strides)
    return NetworkSpec(
        in_channels=in_channels,
        filters=(2, 3, 4, 4)[: len(strides)],
        strides=strides,
        kernel_size=kernels[: len(strides)],
        upsample_kernel_size=strides[1:],
        res_block=res_block,
    )


@st.composite
def networks(draw):
    res_block = draw(st.booleans())
    n_levels = draw(st.integers(3, 4))
    # A residual block has a convolution of kernel 1, which MONAI pads up to a stride of 2.
    sizes = (1, 2) if res_block else (1, 2, 3, 5)
    stride = st.tuples(*[st.sampled_from(sizes)] * 3)
    strides = draw(st.lists(stride, min_size=n_levels - 1, max_size=n_levels - 1))
    kernels = [(3, 3, 3)]
    for steps in strides:
        fitting = [st.sampled_from([k for k in (1, 3, 5) if k >= step - 1]) for step in steps]
        kernels.append(draw(st.tuples(*fitting)))
    return network(strides, tuple(kernels), res_block, draw(st.integers(1, 2)))


CUBES = ((3, 3, 3),) * 4


@settings(max_examples=1)
@given(networks(), st.tuples(*[st.integers(1, 3)] * 3))
@example(network([(3, 3, 3), (3, 3, 3)], CUBES, res_block=False), (2, 2, 2))
@example(network([(1, 5, 5), (2, 2, 2)], ((5, 5, 5),) * 4, res_block=False), (3, 3, 2))
@example(network([(2, 2, 2), (2, 2, 2), (2, 2, 2)], CUBES), (2, 5, 3))
def test_a_conversion_predicts_what_pytorch_does_for_any_network_and_patch(spec, times):
    shape = tuple(n * multiple for n, multiple in zip(times, spec.patch_multiple, strict=True))
    assume(np.prod(times) > 1)
    assume(np.prod(shape) <= MAX_VOXELS)
    bundle = bundle_of(spec)
    patch = np.random.default_rng(0).gamma(0.5, 2.0, (1, spec.in_channels, *shape))
    patch = patch.astype(np.float32)
    with one_thread(), torch.inference_mode():
        expected = build_network(bundle)(torch.from_numpy(patch)).numpy()
        converted = convert(bundle)
    converted.reshape(list(patch.shape))
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    found = compiled(patch)[0]
    np.testing.assert_allclose(found, expected, atol=2e-4 * max(1, np.abs(expected).max()))


def bundle_of(spec):
    weights = fit_weights(spec, seeded_network(spec).state_dict())
    return Bundle("random", "0" * 64, spec, weights=weights)

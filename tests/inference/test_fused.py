"""The fused forward pass is MONAI's, in fewer passes over memory."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaseg_dask.inference.fused import Graphs, fuse
from megaseg_dask.models import NetworkSpec
from tests.fixtures.bundles import TINY, one_thread, seeded_head, seeded_network

LAST = torch.channels_last_3d
LIGHT = NetworkSpec(filters=(8, 16, 24, 32, 48))


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@st.composite
def networks(draw):
    n_levels = draw(st.integers(3, 4))
    stride = st.tuples(*[st.sampled_from((1, 2))] * 3)
    kernel = st.tuples(*[st.sampled_from((1, 3))] * 3)
    strides = ((1, 1, 1), *(draw(stride) for _ in range(n_levels - 1)))
    filters = draw(st.lists(st.sampled_from((2, 4, 5)), min_size=n_levels, max_size=n_levels))
    return NetworkSpec(
        in_channels=draw(st.integers(1, 2)),
        out_channels=draw(st.integers(1, 2)),
        filters=tuple(filters),
        strides=strides,
        kernel_size=tuple(draw(kernel) for _ in range(n_levels)),
        upsample_kernel_size=strides[1:],
        res_block=draw(st.booleans()),
    )


@settings(max_examples=8)
@given(networks(), st.integers(1, 2))
def test_the_logits_are_those_of_monai_for_any_network(spec, n_patches):
    network = seeded_network(spec)
    shape = [2 * n for n in spec.patch_multiple]
    patches = torch.randn(n_patches, spec.in_channels, *shape)
    with one_thread(), torch.inference_mode():
        fused = fuse(network, torch.float32)
        assert relative_error(fused(patches), network(patches)) < 1e-6
        # Once more: nothing of the first pass is left.
        assert relative_error(fused(patches), network(patches)) < 1e-6


def test_half_weights_give_about_the_same_and_leave_the_network_as_it_was():
    network = seeded_network(LIGHT)
    patches = torch.randn(2, 1, 16, 32, 32)
    with one_thread(), torch.inference_mode():
        expected = network(patches)
        found = fuse(network, torch.bfloat16)(patches)
        assert found.dtype == torch.float32
        assert 1e-4 < relative_error(found, expected) < 0.05
        assert torch.equal(network(patches), expected)


@pytest.mark.parametrize(
    "network",
    [
        seeded_head(2, 1, 1),
        torch.nn.Sequential(seeded_network(TINY)),
        seeded_network(TINY).apply(lambda m: setattr(m, "norm1", torch.nn.Identity())),
    ],
)
def test_another_network_has_no_fused_pass(network):
    assert fuse(network, torch.float32) is None


def calls_of(forward, patches):
    with one_thread(), torch.inference_mode():
        forward(patches)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
            forward(patches)
    return Counter({event.key: event.count for event in recorded.key_averages()})


def test_norms_and_copies_of_a_pass_are_gone():
    """As eager PyTorch runs it in half precision and channels last, and as it is fused."""
    network = seeded_network(LIGHT)
    patches = torch.randn(1, 1, 32, 32, 32)
    eager = seeded_network(LIGHT).to(memory_format=LAST)

    def run(values):
        with torch.autocast("cpu", torch.bfloat16):
            return eager(values.to(memory_format=LAST))

    before = calls_of(run, patches)
    after = calls_of(fuse(network, torch.bfloat16), patches)
    assert before["aten::instance_norm"] == 23
    assert before["aten::clone"] + before["aten::_to_copy"] >= 55
    assert after["aten::instance_norm"] == after["aten::clone"] == after["aten::cat"] == 0
    # The logits to float32; the patches; skip and upsampled half of each concatenation. With
    # Triton the skip is none.
    assert after["aten::_to_copy"] == 1
    assert after["aten::copy_"] == 1 + 1 + 8
    assert after["aten::batch_norm"] == 23


def test_a_batch_on_a_cpu_needs_no_graph():
    graphs = Graphs(lambda patches: patches + 1)
    assert torch.equal(graphs(torch.ones(2)), torch.full((2,), 2.0))

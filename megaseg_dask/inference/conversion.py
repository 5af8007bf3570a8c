"""A bundle becomes an OpenVINO model: traced from PyTorch, with an instance norm that is exact.

Only a conversion needs PyTorch. Its result is kept, so most workers never import this module.
"""

import openvino
import torch
from torch.nn.functional import avg_pool3d

from megaseg_dask.concurrency import ignored_warnings
from megaseg_dask.models.build import build_network
from megaseg_dask.models.bundle import Bundle

# Voxels per axis of the windows that instance norm sums over first, where extents allow.
_MAX_WINDOW = 8


def convert(bundle: Bundle) -> openvino.Model:
    """Return the network of a bundle as an OpenVINO model that takes patches of any shape."""
    # Traced at the smallest shape, which is quick.
    smallest = tuple(2 * n for n in bundle.network.patch_multiple)
    example = torch.zeros((1, bundle.network.in_channels, *smallest))
    network = build_network(bundle)
    _pool_norms(network)
    # The tracer warns of each check of a shape.
    with ignored_warnings(), torch.inference_mode():
        return openvino.convert_model(network, example_input=example)


class _PooledNorm(torch.nn.Module):
    """Instance norm whose sums are taken over windows first.

    OpenVINO's own adds up the million voxels of a channel one after the other in
    float32, and was 1e-3 off where large values are rare; this is 1e-6 off, and as
    fast.
    """

    def __init__(self, norm: torch.nn.InstanceNorm3d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Map ``(n, c, z, y, x)`` to the same shape.

        It is traced at twice the smallest extents, of which all others are multiples. So are
        they of the windows, and every voxel counts.
        """
        window = [_window(int(extent) // 2) for extent in values.shape[2:]]
        space = (-3, -2, -1)
        mean = avg_pool3d(values, window).mean(space, keepdim=True)
        variance = avg_pool3d((values - mean) ** 2, window).mean(space, keepdim=True)
        gain = self.norm.weight[:, None, None, None] * torch.rsqrt(variance + self.norm.eps)
        # From the values again, not from the centred ones, which would be kept in memory.
        return values * gain + (self.norm.bias[:, None, None, None] - mean * gain)


def _window(extent: int) -> int:
    """Return the largest divisor of the smallest extent that is no larger than a window."""
    return max(n for n in range(1, _MAX_WINDOW + 1) if extent % n == 0)


def _pool_norms(module: torch.nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.InstanceNorm3d):
            setattr(module, name, _PooledNorm(child))
        elif not isinstance(child, _PooledNorm):
            _pool_norms(child)

"""DynUNet's forward pass for a GPU: channels last throughout, half weights, few kernels.

PyTorch's instance norm returns another layout than it takes, so that MONAI's network copies each
map twice around each of its norms. Here norm, activation and residual are one pass that keeps the
layout, a skip is written where it will be concatenated, and all launches of a batch are one CUDA
graph. The convolutions are cuDNN's.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from monai.networks.blocks.dynunet_block import UnetBasicBlock, UnetResBlock
from monai.networks.nets.dynunet import DynUNet
from torch.nn import functional

from megaseg_dask.inference.gpu import first_line, is_out_of_memory

_LOG = logging.getLogger(__name__)

_LAYOUT = torch.channels_last_3d
_BLOCKS = (UnetResBlock, UnetBasicBlock)
# A tensor of one channel has no layout, so that a convolution of it returns another one. Tensor
# cores take channels by eight.
_LEAST_CHANNELS = 8
# Passes before a graph is captured: they choose and compile kernels.
_WARM_UP_PASSES = 2
_MAX_GRAPHS = 2

Forward = Callable[[torch.Tensor], torch.Tensor]


class NormAct(Protocol):
    """The leaky ReLU of a norm, plus a residual: see :func:`norm_act`."""

    def __call__(
        self,
        values: torch.Tensor,
        norm: torch.nn.InstanceNorm3d,
        slope: float,
        residual: torch.Tensor | None = None,
        residual_norm: torch.nn.InstanceNorm3d | None = None,
        copy_to: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return a tensor of the shape and the layout of ``values``."""
        ...


def open_fused(network: torch.nn.Module, dtype: torch.dtype) -> "Graphs | None":
    """Return the fused forward pass of a network as graphs; ``None`` where it has none."""
    fused = fuse(network, dtype)
    return None if fused is None else Graphs(fused)


def fuse(network: torch.nn.Module, dtype: torch.dtype) -> "Fused | None":
    """Return the fused forward pass of a network on its device; ``None`` where it has none."""
    if not _is_known(network):
        return None
    device = next(network.parameters()).device
    return Fused(network, dtype, _choose_norm(device, dtype))


def _is_known(network: Any) -> bool:
    """Return whether all layers of a network are those that a fused pass computes."""
    if type(network) is not DynUNet:
        return False
    # Maps of one channel have no layout.
    has_layout = all(n_filters > 1 for n_filters in network.filters)
    blocks = [module for module in network.modules() if isinstance(module, _BLOCKS)]
    return has_layout and all(map(_is_known_block, blocks))


def _is_known_block(block: Any) -> bool:
    norms = [block.norm1, block.norm2]
    if hasattr(block, "conv3"):
        norms.append(block.norm3)
    has_known_norms = all(type(norm) is torch.nn.InstanceNorm3d and norm.affine for norm in norms)
    return has_known_norms and type(block.lrelu) is torch.nn.LeakyReLU


def _choose_norm(device: torch.device, dtype: torch.dtype) -> NormAct:
    """Return Triton's norm where it compiles, else PyTorch's."""
    if device.type == "cpu":
        return norm_act
    try:
        from megaseg_dask.inference import kernels

        # Compiled here: without a compiler it fails now, and not in a task.
        values = torch.ones((1, 8, 2, 2, 2), dtype=dtype, device=device)
        norm = torch.nn.InstanceNorm3d(8, affine=True).to(device)
        kernels.norm_act(values.contiguous(memory_format=_LAYOUT), norm, 0.01)
        torch.cuda.synchronize()
    # Whatever fails: a device that is lost says so in the next pass.
    except Exception as error:
        _LOG.warning(
            "Triton cannot be used here (%s): norms take several passes, which is slower; it "
            "needs the packages triton and a C compiler",
            first_line(error),
        )
        return norm_act
    return kernels.norm_act


# -- norms without Triton


def norm_act(
    values: torch.Tensor,
    norm: torch.nn.InstanceNorm3d,
    slope: float,
    residual: torch.Tensor | None = None,
    residual_norm: torch.nn.InstanceNorm3d | None = None,
    copy_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the leaky ReLU of a norm, plus a residual, ``(n, c, z, y, x)`` channels last.

    The residual is normalized too if it has a norm. ``copy_to`` gets the same values: some
    channels of a tensor that is channels last.
    """
    activation = _normalize(values, norm)
    if residual is not None:
        if residual_norm is not None:
            residual = _normalize(residual, residual_norm)
        activation += residual
    functional.leaky_relu_(activation, slope)
    if copy_to is not None:
        copy_to.copy_(activation)
    return activation


def _normalize(values: torch.Tensor, norm: torch.nn.InstanceNorm3d) -> torch.Tensor:
    """Return an instance norm in the layout of its input: batch norms of one sample each.

    A sample is seen as an image of two dimensions, which keeps channels last.
    """
    n_samples, n_channels, n_z, n_y, n_x = values.shape
    samples = values.permute(0, 2, 3, 4, 1).reshape(n_samples, n_z * n_y, n_x, n_channels)
    normalize = partial(
        functional.batch_norm,
        running_mean=None,
        running_var=None,
        weight=norm.weight,
        bias=norm.bias,
        training=True,
        eps=norm.eps,
    )
    normalized = list(map(normalize, samples.permute(0, 3, 1, 2).unsqueeze(1)))
    joined = normalized[0] if n_samples == 1 else torch.cat(normalized)
    spread = joined.permute(0, 2, 3, 1).reshape(n_samples, n_z, n_y, n_x, n_channels)
    return spread.permute(0, 4, 1, 2, 3)


# -- the forward pass


class Fused:
    """The forward pass of a DynUNet, whose weights are kept in one precision."""

    def __init__(self, network: Any, dtype: torch.dtype, norm: NormAct) -> None:
        """Convert the weights; the network itself stays as it is."""
        self._network = network
        self._dtype = dtype
        self._norm = norm
        self._weights = {}
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv3d | torch.nn.ConvTranspose3d):
                bias = None if layer.bias is None else layer.bias.to(dtype)
                self._weights[layer] = (_with_channels(layer.weight, dtype), bias)

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Map patches ``(n, c, z, y, x)`` to logits of the same form, float32."""
        network = self._network
        maps = _with_channels(patches, self._dtype)
        joined = []
        for block in (network.input_block, *network.downsamples):
            before = self._convolve(block.conv1, maps)
            # The upper half of what will be concatenated.
            both = _empty_like(before, 2 * before.shape[1], self._dtype)
            maps = self._finish_block(block, before, maps, both[:, before.shape[1] :])
            joined.append(both)
        maps = self._block(network.bottleneck, maps)
        for up, both in zip(network.upsamples, reversed(joined), strict=True):
            upsampled = self._convolve(up.transp_conv, maps)
            both[:, : upsampled.shape[1]].copy_(upsampled)
            maps = self._block(up.conv_block, both)
        return self._convolve(network.output_block.conv, maps).float()

    def _block(self, block: Any, maps: torch.Tensor) -> torch.Tensor:
        return self._finish_block(block, self._convolve(block.conv1, maps), maps, None)

    def _finish_block(
        self,
        block: Any,
        before: torch.Tensor,
        maps: torch.Tensor,
        copy_to: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the output of a block, after its first convolution of ``maps``."""
        slope = block.lrelu.negative_slope
        inner = self._convolve(block.conv2, self._norm(before, block.norm1, slope))
        residual = None
        residual_norm = None
        if isinstance(block, UnetResBlock):
            residual = maps
            if hasattr(block, "conv3"):
                residual = self._convolve(block.conv3, maps)
                residual_norm = block.norm3
        return self._norm(inner, block.norm2, slope, residual, residual_norm, copy_to)

    def _convolve(self, convolution: Any, maps: torch.Tensor) -> torch.Tensor:
        layer = convolution.conv
        weight, bias = self._weights[layer]
        if layer.transposed:
            convolved = functional.conv_transpose3d(
                maps, weight, bias, layer.stride, layer.padding, layer.output_padding
            )
        else:
            convolved = functional.conv3d(maps, weight, bias, layer.stride, layer.padding)
        # It is in this layout already, where a library keeps it.
        return convolved.contiguous(memory_format=_LAYOUT)


def _with_channels(maps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return maps or weights channels last; a single channel gets others of zeros beside it."""
    if maps.shape[1] > 1:
        return maps.to(dtype).contiguous(memory_format=_LAYOUT)
    padded = _empty_like(maps, _LEAST_CHANNELS, dtype).zero_()
    padded[:, :1].copy_(maps)
    return padded


def _empty_like(maps: torch.Tensor, n_channels: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (len(maps), n_channels, *maps.shape[2:])
    return torch.empty(shape, dtype=dtype, device=maps.device, memory_format=_LAYOUT)


# -- graphs


class Graphs:
    """A forward pass as one CUDA graph for each shape of a batch.

    One thread uses it: cuDNN's choice of kernels, and what a capture sees, are a thread's own.
    """

    def __init__(self, forward: Forward) -> None:
        """Capture nothing yet."""
        self._forward = forward
        self._by_shape: dict[tuple[int, ...], _Graph] = {}
        self._captures = True

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch; they are overwritten by those of the next one."""
        if not patches.is_cuda or not self._captures:
            return self._forward(patches)
        shape = tuple(patches.shape)
        if shape not in self._by_shape:
            # Whole batches, and the rest of those that were too large.
            if len(self._by_shape) == _MAX_GRAPHS:
                self._by_shape.clear()
            try:
                self._by_shape[shape] = _Graph(self._forward, patches)
            except RuntimeError as error:
                self._by_shape.clear()
                if is_out_of_memory(error):
                    raise
                self._captures = False
                _LOG.warning("launches are not captured, which is slower: %s", first_line(error))
                return self._forward(patches)
        return self._by_shape[shape](patches)


class _Graph:
    """The launches of one forward pass, with the memory that they read and write."""

    def __init__(self, forward: Forward, patches: torch.Tensor) -> None:
        self._patches = patches.clone()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_PASSES):
                forward(self._patches)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads pin memory meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = forward(self._patches)

    def __call__(self, patches: torch.Tensor) -> torch.Tensor:
        self._patches.copy_(patches)
        self._graph.replay()
        return self._logits

"""What the page's controls are made from: the axes and layers of a scene."""

from dataclasses import dataclass

from megaseg_dask.tools.view.contrast import Limits
from megaseg_dask.tools.view.gallery import IMAGE, LABELS, Layer, Scene
from megaseg_dask.tools.view.neuroglancer_state import OPACITY


@dataclass(frozen=True, slots=True)
class AxisControl:
    """An axis of ``n`` voxels from the world's ``first``; ``scale`` is in ``unit``, if known."""

    name: str
    n: int
    first: float
    scale: float
    unit: str


@dataclass(frozen=True, slots=True)
class LayerControl:
    """One layer; ``range`` is what becomes black and white, and ``span`` bounds its sliders.

    ``threshold`` is that of the labels of scores, and ``is_rounded`` says that they are stored as
    whole numbers.
    """

    name: str
    kind: str
    visible: bool
    opacity: float
    range: Limits
    span: Limits | None
    threshold: float
    is_rounded: bool
    is_truth: bool


def axes_of(scene: Scene) -> list[AxisControl]:
    """Return the axes of a scene, x first."""
    dimensions = scene.dimensions
    extents = scene.extents
    origin = scene.origin
    return [
        AxisControl(name, extents[name], origin[name], *dimensions[name]) for name in dimensions
    ]


def layers_of(scene: Scene) -> list[LayerControl]:
    """Return the layers of a scene, in its order."""
    return [
        LayerControl(
            layer.name,
            layer.kind,
            layer.visible,
            OPACITY[layer.kind],
            layer.limits,
            None if layer.kind == LABELS else _span(layer),
            layer.threshold,
            layer.image.dtype.startswith("uint"),
            layer.is_truth,
        )
        for layer in scene.layers
    ]


def _span(layer: Layer) -> Limits:
    """Return the bounds of a layer's sliders: of an image, they reach beyond its sample."""
    low, high = layer.limits
    return low, low + 2 * (high - low) if layer.kind == IMAGE else high

"""A scene as a state of Neuroglancer, and the changes that the page's controls make to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.tools.view.gallery import IMAGE, LABELS, SCORES, Layer, Limits, Scene

# Neuroglancer's JSON, of its own form.
State = dict[str, Any]

_LAYOUTS = ("xy", "4panel")
_OPACITY = {IMAGE: 1.0, SCORES: 0.45, LABELS: 0.45}
_LABEL_OPACITIES = ("notSelectedAlpha", "selectedAlpha")
_SCORES_COLOR = "vec3(value, value * 0.55, 0.0)"
# Each of several channels has another color, and they add up.
_CHANNEL_COLORS = (
    "vec3(value)",
    "vec3(0.0, value, 0.0)",
    "vec3(value, 0.0, value)",
    "vec3(0.0, value, value)",
)
# Pixels of the window that the larger side of the image fills.
_WINDOW_WIDTH = 700


@dataclass(frozen=True, slots=True)
class AxisControl:
    """A slider of the page: an axis of ``n`` voxels from the world's ``first``, now at ``at``."""

    name: str
    n: int
    first: float
    at: float


@dataclass(frozen=True, slots=True)
class LayerControl:
    """The controls of one layer; ``span`` bounds the sliders of its range, labels have none."""

    name: str
    visible: bool
    opacity: float
    range: Limits
    span: Limits | None


@dataclass(frozen=True, slots=True)
class Controls:
    """All controls of a scene, as the page shows them."""

    axes: list[AxisControl]
    layers: list[LayerControl]
    layout: str


# -- a new state


def state_of(scene: Scene, url_of: Callable[[Layer], str]) -> State:
    """Return the state that shows a scene from its middle; ``url_of`` is the URL of a group."""
    extents = scene.extents
    larger_side = max(extents["x"], extents["y"])
    return {
        "dimensions": {name: list(value) for name, value in scene.dimensions.items()},
        "position": [_first_position(scene, name) for name in extents],
        "crossSectionScale": larger_side / _WINDOW_WIDTH,
        "projectionScale": larger_side * 1.6,
        "layers": _layers(scene, url_of),
        "layout": "xy",
        "showAxisLines": False,
        "showDefaultAnnotations": False,
        "crossSectionBackgroundColor": "#000000",
    }


def _first_position(scene: Scene, axis: str) -> float:
    """Return the first timepoint, or the middle of an axis of space."""
    # The center of a voxel of OME-Zarr has whole numbers.
    middle = 0 if axis == "t" else scene.extents[axis] // 2
    return scene.origin[axis] + middle


def _layers(scene: Scene, url_of: Callable[[Layer], str]) -> list[State]:
    layers = []
    n_images = 0
    for layer in scene.layers:
        driver = f"zarr{VERSIONS[layer.image.version].zarr_format}"
        common: State = {
            "name": layer.name,
            "source": f"{url_of(layer)}/|{driver}:",
            "visible": layer.kind != SCORES,
        }
        match layer.kind:
            case "labels":
                layers.append(common | _label_layer())
            case "scores":
                layers.append(common | _image_layer(layer, _SCORES_COLOR))
            case _:
                color = _CHANNEL_COLORS[n_images % len(_CHANNEL_COLORS)]
                blend = "additive" if n_images else "default"
                layers.append(common | _image_layer(layer, color, blend))
                n_images += 1
    return layers


def _label_layer() -> State:
    return {"type": "segmentation", **dict.fromkeys(_LABEL_OPACITIES, _OPACITY[LABELS])}


def _image_layer(layer: Layer, color: str, blend: str = "default") -> State:
    state: State = {
        "type": "image",
        "shader": "#uicontrol invlerp normalized\n"
        f"void main() {{ float value = normalized(); emitRGB({color}); }}",
        "shaderControls": _range_control(layer.limits),
        "opacity": _OPACITY[layer.kind],
        "blend": blend,
    }
    if "c" in layer.image.axis_names:
        state["localDimensions"] = {"c'": [1, ""]}
        state["localPosition"] = [layer.channel]
    return state


def _range_control(limits: Limits) -> State:
    return {"normalized": {"range": list(limits)}}


# -- changes


def changed(state: State, change: Mapping[str, Any]) -> State:
    """Return a state with the change of one of the page's controls.

    ``position`` maps axes to voxels; ``layers`` maps names to ``visible``, ``opacity`` and
    ``range``; ``layout`` is Neuroglancer's. Other keys and unknown names are ignored.

    Raises:
        TypeError, ValueError, AttributeError: A value has another type.

    """
    changes = change.get("layers") or {}
    layers = [_changed_layer(old, changes.get(old["name"], {})) for old in state["layers"]]
    position = dict(zip(state["dimensions"], state.get("position", []), strict=False))
    for axis, value in (change.get("position") or {}).items():
        if axis in position:
            position[axis] = float(value)
    result = {**state, "layers": layers, "position": list(position.values())}
    if change.get("layout") in _LAYOUTS:
        result["layout"] = change["layout"]
    return result


def _changed_layer(layer: State, change: Mapping[str, Any]) -> State:
    result = dict(layer)
    is_labels = layer["type"] == "segmentation"
    if "visible" in change:
        result["visible"] = bool(change["visible"])
    if "opacity" in change:
        names = _LABEL_OPACITIES if is_labels else ("opacity",)
        result |= dict.fromkeys(names, float(change["opacity"]))
    if "range" in change and not is_labels:
        low, high = map(float, change["range"])
        result["shaderControls"] = _range_control((low, high))
    return result


def keep_looks(before: State, after: State) -> None:
    """Copy visibility, opacity and layout to a new state, for layers of the same names."""
    old_layers = {layer["name"]: layer for layer in before["layers"]}
    for layer in after["layers"]:
        old_layer = old_layers.get(layer["name"], {})
        for name in ("visible", "opacity", *_LABEL_OPACITIES):
            if name in old_layer:
                layer[name] = old_layer[name]
    after["layout"] = before.get("layout", after["layout"])


# -- the page's controls


def controls_of(scene: Scene, state: State) -> Controls:
    """Return the controls of a scene, at the values of a state."""
    position = dict(zip(state["dimensions"], state.get("position", []), strict=False))
    axes = []
    for name, n in scene.extents.items():
        if name in ("t", "z") and n > 1:
            first = scene.origin[name]
            axes.append(AxisControl(name, n, first, position.get(name, first)))
    shown = {layer["name"]: layer for layer in state["layers"]}
    layers = [_layer_control(layer, shown.get(layer.name, {})) for layer in scene.layers]
    return Controls(axes, layers, state.get("layout", "xy"))


def _layer_control(layer: Layer, state: State) -> LayerControl:
    is_labels = layer.kind == LABELS
    opacity = "notSelectedAlpha" if is_labels else "opacity"
    control = state.get("shaderControls", {}).get("normalized", {})
    low, high = control.get("range", layer.limits)
    return LayerControl(
        layer.name,
        state.get("visible", True),
        state.get(opacity, 1.0),
        (low, high),
        None if is_labels else _span(layer),
    )


def _span(layer: Layer) -> Limits:
    """Return the bounds of a layer's sliders: of an image, they reach beyond its sample."""
    low, high = layer.limits
    return low, low + 2 * (high - low) if layer.kind == IMAGE else high

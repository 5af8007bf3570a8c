"""A scene as a state of Neuroglancer, as the page first shows it.

The page changes it afterwards, by Neuroglancer's own objects. Neuroglancer knows the layers by
number, and the page by name.
"""

from collections.abc import Callable
from typing import Any

from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.tools.view.gallery import LABELS, SCORES, Layer, Scene

# Neuroglancer's JSON, of its own form.
State = dict[str, Any]

OPACITY = {"image": 1.0, SCORES: 0.45, LABELS: 0.45}
# Each of several channels has another color, and they add up.
_CHANNEL_COLORS = (
    "vec3(value)",
    "vec3(0.0, value, 0.0)",
    "vec3(value, 0.0, value)",
    "vec3(0.0, value, value)",
)
_IMAGE_SHADER = """#uicontrol invlerp normalized
void main() {{
  float value = normalized();
  emitRGB({color});
}}
"""
_SCORES_SHADER = """#uicontrol invlerp normalized
void main() {
  float value = normalized();
  emitRGB(vec3(value, value * 0.55, 0.0));
}
"""


def state_of(scene: Scene, url_of: Callable[[Layer], str]) -> State:
    """Return the state that shows a scene from its middle; ``url_of`` is the URL of a group."""
    extents = scene.extents
    return {
        "dimensions": {name: list(value) for name, value in scene.dimensions.items()},
        "displayDimensions": [name for name in extents if name != "t"],
        "position": [_first_position(scene, name) for name in extents],
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
    for number, layer in enumerate(scene.layers):
        driver = f"zarr{VERSIONS[layer.image.version].zarr_format}"
        common: State = {
            "name": str(number),
            "source": f"{url_of(layer)}/|{driver}:",
            "visible": layer.visible,
        }
        match layer.kind:
            case "labels":
                layers.append(common | _label_layer())
            case "scores":
                layers.append(common | _image_layer(layer, _SCORES_SHADER))
            case _:
                color = _CHANNEL_COLORS[n_images % len(_CHANNEL_COLORS)]
                blend = "additive" if n_images else "default"
                shader = _IMAGE_SHADER.format(color=color)
                layers.append(common | _image_layer(layer, shader, blend))
                n_images += 1
    return layers


def _label_layer() -> State:
    opacity = OPACITY[LABELS]
    return {"type": "segmentation", "selectedAlpha": opacity, "notSelectedAlpha": opacity}


def _image_layer(layer: Layer, shader: str, blend: str = "default") -> State:
    state: State = {
        "type": "image",
        "shader": shader,
        "shaderControls": {"normalized": {"range": list(layer.limits)}},
        "opacity": OPACITY[layer.kind],
        "blend": blend,
    }
    if "c" in layer.image.axis_names:
        state["localDimensions"] = {"c'": [1, ""]}
        state["localPosition"] = [layer.channel]
    return state

"""A scene as a state of Neuroglancer, as the page first shows it.

The page changes it afterwards, by Neuroglancer's own objects. Neuroglancer knows the layers by
number, and the page by name.
"""

from typing import Any, Protocol

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
# As a mask it shows what is above a threshold, strictly: stored values above the limit of it.
_SCORES_SHADER = """#uicontrol invlerp normalized
#uicontrol bool asMask checkbox(default=false)
#uicontrol float limit slider(min=-1, max=255, default=127)
void main() {
  if (asMask) {
    if (float(toRaw(getDataValue())) > limit) {
      emitRGB(vec3(0.1, 0.85, 1.0));
    } else {
      emitTransparent();
    }
    return;
  }
  float value = normalized();
  emitRGB(vec3(value, value * 0.55, 0.0));
}
"""
# How objects are seen in 3D at first: from above and a little from the side, a quaternion.
_TILTED = [-0.46, -0.13, -0.07, 0.87]
# The colors of true labels: one for all, that is no color of another layer.
_TRUTH_COLOR = "#ffffff"


class Urls(Protocol):
    """Where the server has what is drawn."""

    def of(self, layer: Layer) -> str:
        """Return the URL of the group of a layer."""

    def backdrop_of(self, scene: Scene) -> str:
        """Return the URL of the backdrop of a scene."""

    def outlines_of(self, layer: Layer) -> str:
        """Return the URL of the outlines of a layer of labels."""

    def meshes_of(self, layer: Layer, t: int) -> str:
        """Return the URL of the meshes of a layer of labels, at a timepoint of its own."""


def state_of(scene: Scene, urls: Urls) -> State:
    """Return the state that shows a scene from its middle."""
    extents = scene.extents
    return {
        "dimensions": {name: list(value) for name, value in scene.dimensions.items()},
        "displayDimensions": [name for name in extents if name != "t"],
        "position": [_first_position(scene, name) for name in extents],
        "layers": _layers(scene, urls),
        "layout": "xy",
        "projectionOrientation": _TILTED,
        "showAxisLines": False,
        "showDefaultAnnotations": False,
        "crossSectionBackgroundColor": "#000000",
    }


def _first_position(scene: Scene, axis: str) -> float:
    """Return the first timepoint, or the middle of an axis of space."""
    # The center of a voxel of OME-Zarr has whole numbers.
    middle = 0 if axis == "t" else scene.extents[axis] // 2
    return scene.origin[axis] + middle


def _layers(scene: Scene, urls: Urls) -> list[State]:
    layers: list[State] = [
        {
            "name": "backdrop",
            "type": "image",
            "source": f"{urls.backdrop_of(scene)}/|zarr3:",
            "shader": "void main() { emitRGB(vec3(0.0)); }",
            "opacity": 1,
        }
    ]
    # Labels lie above what they are compared with.
    labels: list[State] = []
    n_images = 0
    for number, layer in enumerate(scene.layers):
        driver = f"zarr{VERSIONS[layer.image.version].zarr_format}"
        common: State = {
            "name": str(number),
            "source": f"{urls.of(layer)}/|{driver}:",
            "visible": layer.visible,
        }
        match layer.kind:
            case "labels":
                labels.append(common | _label_layer(layer))
                labels.append(_outline_layer(layer, number, urls))
                labels.append(_mesh_layer(scene, number, urls))
            case "scores":
                layers.append(common | _image_layer(layer, _SCORES_SHADER))
            case _:
                color = _CHANNEL_COLORS[n_images % len(_CHANNEL_COLORS)]
                blend = "additive" if n_images else "default"
                shader = _IMAGE_SHADER.format(color=color)
                layers.append(common | _image_layer(layer, shader, blend))
                n_images += 1
    return layers + labels


def _label_layer(layer: Layer) -> State:
    opacity = OPACITY[LABELS]
    state = {
        "type": "segmentation",
        "selectedAlpha": opacity,
        "notSelectedAlpha": opacity,
        "hoverHighlight": False,
    }
    if layer.is_truth:
        state["segmentDefaultColor"] = _TRUTH_COLOR
    return state


def _outline_layer(layer: Layer, number: int, urls: Urls) -> State:
    """Return the outlines of labels; what is selected and hidden is as in the labels."""
    return {
        **_label_layer(layer),
        "name": f"{number}:outlines",
        "source": f"{urls.outlines_of(layer)}/|zarr3:",
        "visible": False,
        "linkedSegmentationGroup": str(number),
        "pick": False,
    }


def _mesh_layer(scene: Scene, number: int, urls: Urls) -> State:
    """Return the layer of the meshes of a layer of labels, at its first timepoint; none is chosen.

    Corners are in voxels of the labels, and the transformation puts them into the world.
    """
    layer = scene.layers[number]
    names = "xyz"
    voxel = {}
    matrix = []
    for row, name in enumerate(names):
        factor, offset = scene.world_of(layer, name)
        scale, unit = scene.dimensions[name]
        voxel[name] = [scale * factor, unit]
        matrix.append([float(column == row) for column in range(3)] + [offset])
    state = {
        "type": "segmentation",
        "name": f"{number}:meshes",
        "source": {
            "url": mesh_source(urls.meshes_of(layer, 0)),
            "transform": {
                "outputDimensions": {name: list(scene.dimensions[name]) for name in names},
                "inputDimensions": voxel,
                "matrix": matrix,
            },
        },
        "segments": [],
    }
    if layer.is_truth:
        state["segmentDefaultColor"] = _TRUTH_COLOR
    return state


def mesh_source(url: str) -> str:
    """Return how Neuroglancer names meshes."""
    return f"{url}/|neuroglancer-precomputed:"


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

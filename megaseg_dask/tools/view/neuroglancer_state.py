"""A scene as a state of Neuroglancer: layers, sources, colours; and the changes that the page's controls make."""

from collections.abc import Callable, Mapping
from typing import Any

from megaseg_dask.ngff.group import ZARR_FORMAT
from megaseg_dask.tools.view.gallery import Layer, Scene

State = dict[str, Any]

_COLOURS = {"image": "vec3(value)", "scores": "vec3(value, value * 0.55, 0.0)"}
_OPACITY = {"image": 1.0, "scores": 0.45, "labels": 0.45}
# Of several channels each has a colour of its own, and they add up.
_CHANNELS = (
    "vec3(value)",
    "vec3(0.0, value, 0.0)",
    "vec3(value, 0.0, value)",
    "vec3(0.0, value, value)",
)


def state_of(scene: Scene, url_of: Callable[[Layer], str]) -> State:
    """Return the state that shows a scene from its middle; ``url_of`` gives the address of a layer's group."""
    dimensions, extents, origin = scene.dimensions, scene.extents, scene.origin
    # The centre of a voxel of OME-Zarr has whole numbers.
    middle = [origin[name] + (0 if name == "t" else extents[name] // 2) for name in dimensions]
    # The larger side fills the window.
    scale = max(extents["x"], extents["y"]) / 700
    layers, n_images = [], 0
    for layer in scene.layers:
        layers.append(_layer(layer, url_of(layer), n_images))
        n_images += layer.kind.startswith("image")
    return {
        "dimensions": {name: list(value) for name, value in dimensions.items()},
        "position": middle,
        "crossSectionScale": scale,
        "projectionScale": max(extents["x"], extents["y"]) * 1.6,
        "layers": layers,
        "layout": "xy",
        "showAxisLines": False,
        "showDefaultAnnotations": False,
        "crossSectionBackgroundColor": "#000000",
    }


def _layer(layer: Layer, url: str, number: int) -> State:
    kind, _, channel = layer.kind.partition(":")
    driver = f"zarr{ZARR_FORMAT[layer.image.version]}"
    found: State = {"name": layer.name, "source": f"{url}/|{driver}:", "visible": kind != "scores"}
    if kind == "labels":
        return {
            **found,
            "type": "segmentation",
            "notSelectedAlpha": _OPACITY[kind],
            "selectedAlpha": _OPACITY[kind],
        }
    colour = _CHANNELS[number % len(_CHANNELS)] if kind == "image" else _COLOURS[kind]
    shader = f"#uicontrol invlerp normalized\nvoid main() {{ float value = normalized(); emitRGB({colour}); }}"
    found |= {
        "type": "image",
        "shader": shader,
        "shaderControls": {"normalized": {"range": list(layer.limits)}},
        "opacity": _OPACITY[kind],
        "blend": "additive" if kind == "image" and number else "default",
    }
    if "c" in layer.image.axis_names:
        found |= {"localDimensions": {"c'": [1, ""]}, "localPosition": [int(channel or 0)]}
    return found


def changed(state: State, change: Mapping[str, Any]) -> State:
    """Return a state with what a control of the page asks for.

    ``position`` maps axes to voxels, ``layers`` names to ``visible``, ``opacity`` and ``range``, ``layout`` is
    Neuroglancer's. What is none of these, or of another type, is left alone: the state is only ever shown.
    """
    state = {**state, "layers": [dict(layer) for layer in state["layers"]]}
    position = list(state.get("position", []))
    for axis, value in (change.get("position") or {}).items():
        names = list(state["dimensions"])
        if axis in names:
            position[names.index(axis)] = float(value)
    state["position"] = position
    for layer in state["layers"]:
        wanted = (change.get("layers") or {}).get(layer["name"], {})
        if "visible" in wanted:
            layer["visible"] = bool(wanted["visible"])
        if "opacity" in wanted:
            alphas = (
                ("notSelectedAlpha", "selectedAlpha")
                if layer["type"] == "segmentation"
                else ("opacity",)
            )
            layer |= dict.fromkeys(alphas, float(wanted["opacity"]))
        if "range" in wanted and layer["type"] == "image":
            layer["shaderControls"] = {"normalized": {"range": [float(v) for v in wanted["range"]]}}
    if change.get("layout") in ("xy", "4panel"):
        state["layout"] = change["layout"]
    return state


def keep_looks(before: State, after: State) -> None:
    """Give the layers of a new state what was chosen for those of the same names."""
    looks = {layer["name"]: layer for layer in before["layers"]}
    for layer in after["layers"]:
        for name in ("visible", "opacity", "notSelectedAlpha", "selectedAlpha"):
            if name in looks.get(layer["name"], {}):
                layer[name] = looks[layer["name"]][name]
    after["layout"] = before.get("layout", after["layout"])


def described(scene: Scene, state: State) -> dict[str, Any]:
    """Return the axes and layers of a scene, and where their controls stand."""
    names, position = list(state["dimensions"]), state.get("position", [])
    values = dict(zip(names, position, strict=False))
    axes = [
        {
            "name": name,
            "n": n,
            "first": scene.origin[name],
            "at": values.get(name, scene.origin[name]),
        }
        for name, n in scene.extents.items()
        if name in ("t", "z") and n > 1
    ]
    shown = {layer["name"]: layer for layer in state["layers"]}
    layers = []
    for layer in scene.layers:
        found = shown.get(layer.name, {})
        labels = layer.kind == "labels"
        low, high = layer.limits
        layers.append(
            {
                "name": layer.name,
                "visible": found.get("visible", True),
                "opacity": found.get("notSelectedAlpha" if labels else "opacity", 1.0),
                "range": found.get("shaderControls", {})
                .get("normalized", {})
                .get("range", [low, high]),
                # Sliders reach beyond what was seen in a sample.
                "span": None
                if labels
                else [low, low + 2 * (high - low) if layer.kind.startswith("image") else high],
            }
        )
    return {"axes": axes, "layers": layers, "layout": state.get("layout", "xy")}

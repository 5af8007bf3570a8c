"""``megaseg view``: image, scores and labels of a target in a browser, offline, from any store.

Neuroglancer draws; its PyPI package contains its web page. Our own page is
around it, with sliders for z and t, the layers and the wells of a plate. One
server on loopback serves both, with a token in its addresses, so that our page
moves the picture without asking anybody.
"""

import asyncio
import contextlib
import math
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import install_command
from megaseg_dask.tools.view.gallery import LABELS, SCORES, Gallery, Layer, Scene
from megaseg_dask.tools.view.made_arrays import Backdrop, attribute_documents
from megaseg_dask.tools.view.meshes import Meshes
from megaseg_dask.tools.view.neuroglancer_state import Urls, mesh_source, state_of
from megaseg_dask.tools.view.objects import Floats, read_objects
from megaseg_dask.tools.view.outlines import Outlines
from megaseg_dask.tools.view.page import axes_of, layers_of
from megaseg_dask.tools.view.server import Json, Server
from megaseg_dask.tools.view.threshold import View, count_in_view

# Ids that the page can show and hide at once.
_MAX_LISTED_OBJECTS = 200_000


def view(
    address: str,
    label_name: str | None,
    announce: Callable[[str], None],
    *,
    truth: str | None = None,
    unmarked: bool = False,
    browser: bool = True,
) -> int:
    """Show a target, or any OME-Zarr image or plate, until interrupted; return the exit code.

    It is that of ``megaseg status``: 0 if all runs there are finished, 1 if something failed, 3 if
    work is pending. ``truth`` names a label image that is shown too, which metadata mark as one
    unless it is ``unmarked``. ``announce`` is called with the URL of the page.

    Raises:
        SettingsError: Neuroglancer is not installed.
        SourceError: There is no image and no plate at the address, or ``truth`` is not marked.
        TargetError: The run there has not published anything.

    """
    gallery = Gallery(address, label_name, truth, unmarked=unmarked)
    drawing = find_drawing()
    # What cannot be shown is said at once, not in the browser.
    gallery.scene(gallery.fields[0])
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(drawing, gallery, announce, browser=browser))
    codes = [run.exit_code for run in gallery.unfinished()]
    # Failures are worse than work that is pending.
    return min(codes, default=0)


def find_drawing() -> Path:
    """Return the folder of Neuroglancer's own page; its Python code is not needed.

    Raises:
        SettingsError: It is not installed.
    """
    spec = find_spec("neuroglancer")
    if spec is None or spec.origin is None:
        raise SettingsError(f"the viewer needs Neuroglancer: {install_command('view')}")
    return Path(spec.origin).parent / "static" / "client"


async def serve(
    drawing: Path,
    gallery: Gallery,
    announce: Callable[[str], None],
    *,
    browser: bool,
    attach: Callable[[Server, Urls], Urls] = lambda server, urls: urls,
) -> None:
    """Serve the page of a gallery until interrupted.

    ``attach`` adds to the server, and returns where it has what is drawn.
    """
    server = Server(drawing)
    session = Session(gallery, attach(server, Published(server)))
    for name, function in session.answers.items():
        server.answer(name, function)
    try:
        announce(f"{server.url}/")
        if browser:
            webbrowser.open(f"{server.url}/")
        await asyncio.Event().wait()
    finally:
        server.close()


class Published:
    """Where the server has what is drawn of a scene."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def of(self, layer: Layer) -> str:
        """Return the URL of the group of a layer."""
        # True labels lie where the image is, whatever they say.
        documents = attribute_documents(layer.image) if layer.is_truth else None
        return self._server.publish(layer.location, documents)

    def backdrop_of(self, scene: Scene) -> str:
        """Return the URL of the backdrop of a scene."""
        name = f"backdrop {scene.layers[0].location.url}"
        return self._server.publish_made(name, Backdrop(scene))

    def outlines_of(self, layer: Layer) -> str:
        """Return the URL of the outlines of a layer of labels."""
        return self._server.publish_made(f"outlines {layer.location.url}", Outlines(layer))

    def meshes_of(self, layer: Layer, t: int) -> str:
        """Return the URL of the meshes of a layer of labels, at a timepoint of its own."""
        return self._server.publish_made(f"meshes {t} {layer.location.url}", Meshes(layer, t))


class Session:
    """Answers the page's questions about the fields of a gallery."""

    def __init__(self, gallery: Gallery, urls: Urls) -> None:
        self._gallery = gallery
        self._urls = urls
        self._scenes: dict[str, Scene] = {}

    @property
    def answers(self) -> Mapping[str, Callable[[Json], Json]]:
        """The questions of the page, by name."""
        return {
            "scene": self.scene,
            "status": self.status,
            "object": self.object,
            "sizes": self.sizes,
            "meshes": self.meshes,
            "count": self.count,
        }

    def _scene(self, field: str) -> Scene:
        if field not in self._gallery.fields:
            raise SettingsError(f"there is no field {field!r}")
        if field not in self._scenes:
            self._scenes[field] = self._gallery.scene(field)
        return self._scenes[field]

    def scene(self, question: Json) -> Json:
        """Return all that the page shows of a field, or of the first one if none is named.

        Raises:
            SettingsError: There is no such field.
            SourceError, TargetError: It has nothing that can be shown.

        """
        gallery = self._gallery
        field = str(question.get("field", gallery.fields[0]))
        # Who opens a field again sees what was written since.
        self._scenes.pop(field, None)
        scene = self._scene(field)
        plate = gallery.plate
        return {
            "name": gallery.name,
            "field": field,
            "rows": plate.rows if plate else [],
            "columns": plate.columns if plate else [],
            "fields": gallery.fields,
            "axes": list(map(asdict, axes_of(scene))),
            "layers": list(map(asdict, layers_of(scene))),
            "command": gallery.command(field),
            "state": state_of(scene, self._urls),
        }

    def status(self, _: Json) -> Json:
        """Return what is to be said of runs that are not finished."""
        return {"notice": self._gallery.notice()}

    def object(self, question: Json) -> Json:
        """Return size and place in the world of one object, or say that there is none."""
        scene, layer, t = self._labels(question)
        label = int(question["id"])
        objects = read_objects(layer, t)
        row = objects.row_of(label)
        if row is None:
            return {"id": label, "found": False}
        position = {}
        for name, centroid in zip("zyx", objects.centroid[:, row].tolist(), strict=True):
            factor, offset = scene.world_of(layer, name)
            position[name] = factor * centroid + offset
        return {
            "id": label,
            "found": True,
            "n_voxels": int(objects.n_voxels[row]),
            "volume_um3": _value(objects.volume_um3, row),
            "intensity_mean": _value(objects.intensity_mean, row),
            "is_exact": objects.is_exact,
            "position": position,
        }

    def sizes(self, question: Json) -> Json:
        """Return ids and sizes in voxels of all objects, the largest first."""
        _, layer, t = self._labels(question)
        objects = read_objects(layer, t)
        if len(objects.label) > _MAX_LISTED_OBJECTS:
            raise SettingsError(
                f"{len(objects.label)} objects are too many to hide some of them; try --min-size "
                "with megaseg relabel"
            )
        order = np.argsort(-objects.n_voxels, kind="stable")
        return {
            "ids": objects.label[order].tolist(),
            "sizes": objects.n_voxels[order].tolist(),
            "is_exact": objects.is_exact,
        }

    def meshes(self, question: Json) -> Json:
        """Return where Neuroglancer finds the meshes of a layer's objects at a timepoint."""
        _, layer, t = self._labels(question)
        return {"source": mesh_source(self._urls.meshes_of(layer, t))}

    def count(self, question: Json) -> Json:
        """Return the number of objects that a threshold gives in the plane that is seen."""
        scene, layer = self._layer(question)
        if layer.kind != SCORES:
            raise SettingsError(f"{layer.name} is no layer of scores")
        at = scene.index_in(layer, _position(question["position"]))
        first = scene.index_in(layer, _position(question["first"]))
        last = scene.index_in(layer, _position(question["last"]))
        view = View(
            t=round(at["t"]),
            z=round(at["z"]),
            y=(first["y"], last["y"]),
            x=(first["x"], last["x"]),
            pixel=float(question["pixel"]),
        )
        return asdict(count_in_view(layer, view, float(question["threshold"]), layer.connectivity))

    def _layer(self, question: Json) -> tuple[Scene, Layer]:
        scene = self._scene(str(question["field"]))
        number = int(question["layer"])
        if not 0 <= number < len(scene.layers):
            raise SettingsError(f"there is no layer {number}")
        return scene, scene.layers[number]

    def _labels(self, question: Json) -> tuple[Scene, Layer, int]:
        """Return scene, layer of labels and its timepoint."""
        scene, layer = self._layer(question)
        if layer.kind != LABELS:
            raise SettingsError(f"{layer.name} is no layer of labels")
        t = round(scene.index_in(layer, _position(question["position"]))["t"])
        if not 0 <= t < layer.image.extent("t"):
            raise SettingsError(f"{layer.name} has no such timepoint")
        return scene, layer, t


def _position(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(axis): float(value) for axis, value in values.items()}


def _value(column: Floats | None, row: int) -> float | None:
    """Return a value that JSON can hold, if it is known."""
    if column is None or not math.isfinite(column[row]):
        return None
    return float(column[row])

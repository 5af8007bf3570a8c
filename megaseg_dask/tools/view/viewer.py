"""``megaseg view``: image, scores and labels of a target in a browser, offline, from any store.

Neuroglancer draws; its PyPI package contains its web page. Our own page is
around it, with sliders for z and t, the layers and the wells of a plate. One
server on loopback serves both, with a token in its addresses, so that our page
moves the picture without asking anybody.
"""

import asyncio
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import install_command
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.gallery import Gallery
from megaseg_dask.tools.view.neuroglancer_state import state_of
from megaseg_dask.tools.view.page import axes_of, layers_of


def view(
    address: str, label_name: str | None, announce: Callable[[str], None], *, browser: bool = True
) -> None:
    """Show a target, or any OME-Zarr image or plate, until interrupted.

    ``announce`` is called with the URL of the page.

    Raises:
        SettingsError: Neuroglancer is not installed.
        SourceError: There is no image and no plate at the address.
        TargetError: The run there has not published anything.

    """
    gallery = Gallery(address, label_name)
    drawing = _find_drawing()
    # What cannot be shown is said at once, not in the browser.
    gallery.scene(gallery.fields[0])
    asyncio.run(_serve(drawing, gallery, announce, browser))


def _find_drawing() -> Path:
    """Return the folder of Neuroglancer's own page; its Python code is not needed.

    Raises:
        SettingsError: It is not installed.
    """
    spec = find_spec("neuroglancer")
    if spec is None or spec.origin is None:
        raise SettingsError(f"the viewer needs Neuroglancer: {install_command('view')}")
    return Path(spec.origin).parent / "static" / "client"


async def _serve(
    drawing: Path, gallery: Gallery, announce: Callable[[str], None], browser: bool
) -> None:
    from megaseg_dask.tools.view.server import Server

    server = Server(drawing)
    session = Session(gallery, server.publish)
    server.answer("scene", session.scene)
    try:
        announce(f"{server.url}/")
        if browser:
            webbrowser.open(f"{server.url}/")
        await asyncio.Event().wait()
    finally:
        server.close()


class Session:
    """Answers the page's questions; ``publish`` returns the URL of a location."""

    def __init__(self, gallery: Gallery, publish: Callable[[Location], str]) -> None:
        self._gallery = gallery
        self._publish = publish

    def scene(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return all that the page shows of a field, or of the first one if none is named.

        Raises:
            SettingsError: There is no such field.
            SourceError, TargetError: It has nothing that can be shown.

        """
        gallery = self._gallery
        field = str(question.get("field", gallery.fields[0]))
        if field not in gallery.fields:
            raise SettingsError(f"there is no field {field!r}")
        scene = gallery.scene(field)
        plate = gallery.plate
        return {
            "name": gallery.name,
            "field": field,
            "rows": plate.rows if plate else [],
            "columns": plate.columns if plate else [],
            "fields": gallery.fields,
            "axes": list(map(asdict, axes_of(scene))),
            "layers": list(map(asdict, layers_of(scene))),
            "state": state_of(scene, lambda layer: self._publish(layer.location)),
        }

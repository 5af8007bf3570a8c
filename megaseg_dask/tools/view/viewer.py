"""``megaseg view``: image, scores and labels of a target in a browser, offline, from any store.

Neuroglancer draws; its PyPI package contains its web page. Our own page is
around it, with sliders for z and t, the layers and the wells of a plate. There
are two servers on loopback, Neuroglancer's and ours, each with a token in its
addresses.
"""

import asyncio
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.messages import install_command
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.gallery import Gallery, Scene
from megaseg_dask.tools.view.neuroglancer_state import changed, controls_of, keep_looks, state_of


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
    try:
        import neuroglancer
    except ImportError as error:
        raise SettingsError(f"the viewer needs Neuroglancer: {install_command('view')}") from error
    asyncio.run(_serve(neuroglancer, gallery, announce, browser))


async def _serve(
    neuroglancer: Any, gallery: Gallery, announce: Callable[[str], None], browser: bool
) -> None:
    from megaseg_dask.tools.view.server import LOOPBACK, Server

    neuroglancer.set_server_bind_address(LOOPBACK)
    viewer = neuroglancer.Viewer()
    with viewer.config_state.txn() as config:
        config.show_ui_controls = False
        config.show_panel_borders = False
    origin = viewer.get_viewer_url().partition("/v/")[0]
    server = Server(allowed_origin=origin)
    session = Session(gallery, viewer, server.publish)
    server.serve_page(session)
    try:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(server.pool, session.open, gallery.fields[0])
        announce(f"{server.url}/")
        if browser:
            webbrowser.open(f"{server.url}/")
        await asyncio.Event().wait()
    finally:
        server.close()
        neuroglancer.stop()


class Session:
    """The scene that Neuroglancer shows; ``publish`` returns the URL of a location."""

    def __init__(self, gallery: Gallery, viewer: Any, publish: Callable[[Location], str]) -> None:
        self._gallery = gallery
        self._viewer = viewer
        self._publish = publish
        self._field = ""
        self._scene = Scene("", ())

    def open(self, field: str) -> None:
        """Show another field; layers keep the looks of those of the same name.

        Raises:
            SettingsError: There is no such field.
            SourceError, TargetError: It has nothing that can be shown.

        """
        if field not in self._gallery.fields:
            raise SettingsError(f"there is no field {field!r}")
        scene = self._gallery.scene(field)
        state = state_of(scene, lambda layer: self._publish(layer.location))
        if self._scene.layers:
            keep_looks(self._viewer.state.to_json(), state)
        self._field = field
        self._scene = scene
        self._viewer.set_state(state)

    def state(self) -> Mapping[str, Any]:
        """Return all that the page shows beside the picture."""
        plate = self._gallery.plate
        controls = controls_of(self._scene, self._viewer.state.to_json())
        return {
            "name": self._gallery.name,
            "viewer": self._viewer.get_viewer_url(),
            "field": self._field,
            "rows": plate.rows if plate else [],
            "columns": plate.columns if plate else [],
            "fields": self._gallery.fields,
            **asdict(controls),
        }

    def change(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Open a field, or change what the controls name; return :meth:`state`.

        Raises:
            SettingsError, SourceError, TargetError: The field cannot be shown.

        """
        if "field" in request:
            self.open(str(request["field"]))
        else:
            self._viewer.set_state(changed(self._viewer.state.to_json(), request))
        return self.state()

"""``megaseg view``: image, scores and labels of a target in a browser, offline, from any store.

Neuroglancer draws; its PyPI package brings its web page along. Around it is a
page of our own with a slider for z and t, the layers and the wells of a plate.
Two servers on loopback, each address with a token: Neuroglancer's, and ours.
"""

import asyncio
import webbrowser
from collections.abc import Callable, Mapping
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.tools.view.gallery import Gallery, Scene
from megaseg_dask.tools.view.neuroglancer_state import changed, described, keep_looks, state_of

_INSTALL = "pip install 'megaseg-dask[view]'"


def view(
    address: str, label_name: str | None, announce: Callable[[str], None], *, browser: bool = True
) -> None:
    """Show a target, or any OME-Zarr image or plate, until interrupted; ``announce`` is told the address to open.

    Raises :class:`SettingsError` if Neuroglancer is not installed, and what :class:`Gallery` raises.
    """
    gallery = Gallery(address, label_name)
    try:
        import neuroglancer
    except ImportError as error:
        raise SettingsError(f"the viewer needs Neuroglancer: {_INSTALL}") from error
    asyncio.run(_serve(neuroglancer, gallery, announce, browser))


async def _serve(
    neuroglancer: Any, gallery: Gallery, announce: Callable[[str], None], browser: bool
) -> None:
    from megaseg_dask.tools.view.server import LOOPBACK, Server

    neuroglancer.set_server_bind_address(LOOPBACK)
    viewer = neuroglancer.Viewer()
    show = _Show(gallery, viewer)
    server = Server(show.tell, show.change)
    show.server, server.friend = server, viewer.get_viewer_url().partition("/v/")[0]
    with viewer.config_state.txn() as config:
        config.show_ui_controls = False
        config.show_panel_borders = False
    try:
        await asyncio.get_running_loop().run_in_executor(server.pool, show.open, gallery.fields[0])
        announce(f"{server.url}/")
        if browser:
            webbrowser.open(f"{server.url}/")
        await asyncio.Event().wait()
    finally:
        server.close()
        neuroglancer.stop()


class _Show:
    """The scene that is shown, and what the page says of it."""

    server: Any

    def __init__(self, gallery: Gallery, viewer: Any) -> None:
        self._gallery, self._viewer = gallery, viewer
        self._field, self._scene = "", Scene("", ())

    def open(self, field: str) -> None:
        """Show another field, with its layers as those of the last one were."""
        if field not in self._gallery.fields:
            raise SettingsError(f"there is no field {field!r}")
        scene = self._gallery.scene(field)
        state = state_of(scene, lambda layer: self.server.publish(layer.location))
        if self._scene.layers:
            keep_looks(self._viewer.state.to_json(), state)
        self._field, self._scene = field, scene
        self._viewer.set_state(state)

    def change(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a control of the page asks for, and tell how it stands then."""
        if "field" in wanted:
            self.open(str(wanted["field"]))
        else:
            self._viewer.set_state(changed(self._viewer.state.to_json(), wanted))
        return self.tell({})

    def tell(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the page shows beside the picture."""
        plate = self._gallery.plate
        return {
            "name": self._gallery.name,
            "viewer": self._viewer.get_viewer_url(),
            "field": self._field,
            "rows": plate.rows if plate else [],
            "columns": plate.columns if plate else [],
            "fields": self._gallery.fields,
            **described(self._scene, self._viewer.state.to_json()),
        }

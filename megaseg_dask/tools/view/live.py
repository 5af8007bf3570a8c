"""``megaseg view SOURCE --model NAME``: scores are predicted where one looks.

The page shows the image, and beside its layers the scores, which a server of its own
predicts. The page tells where a person looks, and is told what to know of what is seen.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.ngff.image import SPATIAL, Image
from megaseg_dask.run.looking import Looking
from megaseg_dask.stores import Location
from megaseg_dask.tools.view.chunk_server import ChunkServer
from megaseg_dask.tools.view.gallery import SCORES, Gallery, Layer, Limits, Scene
from megaseg_dask.tools.view.prediction import PredictedImage, Scores, Sight, WaitingList
from megaseg_dask.tools.view.viewer import Publish, find_drawing, serve

# Neuroglancer counts a voxel as small enough if it is at most this much larger than a pixel.
_MARGIN = 1.1


class LiveGallery(Gallery):
    """The images of a source, with the scores that are predicted of them."""

    def __init__(self, source: str, looking: Looking) -> None:
        super().__init__(source)
        self._looking = looking
        self._waiting = WaitingList(looking)
        scores = Scores()
        self.images: dict[str, PredictedImage] = {}
        self._places: dict[str, int] = {}
        self._scenes: dict[str, Scene] = {}
        for number, run in enumerate(looking.runs):
            for path in run.plan.images:
                image = PredictedImage(looking, number, path, scores, self._waiting)
                self.images[str(len(self.images))] = image
                self._places[path] = len(self.images) - 1
        # What cannot be predicted is not offered: `segment` would not write it either.
        self.fields = [field for field in self.fields if field in self._places]
        looking.changed = self._refresh

    def _refresh(self) -> None:
        for image in self.images.values():
            image.refresh()

    def name_of(self, field: str) -> str:
        """Return the name of the scores of a field, at their server."""
        return str(self._places[field])

    def scene(self, field: str) -> Scene:
        """Return the layers of a field, and the scores that are predicted of it."""
        if field not in self._scenes:
            scene = super().scene(field)
            self._scenes[field] = replace(scene, layers=(*scene.layers, *self._predicted(field)))
        return self._scenes[field]

    def _predicted(self, field: str) -> list[Layer]:
        image = self.images[self.name_of(field)].image
        limits: Limits = (0.0, self._looking.max_score())
        names = image.channel_names or ("",)
        return [
            Layer(f"scores {name}".strip(), SCORES, self.place_of(field), image, limits, channel)
            for channel, name in enumerate(names)
        ]

    def place_of(self, field: str) -> Location:
        """Return where the scores would be; nothing is read there."""
        number = self.images[self.name_of(field)].number
        return self._looking.runs[number].plan.target / field

    def close(self) -> None:
        """Predict nothing more."""
        self._waiting.close()


class Live:
    """Answers what the page asks while scores are predicted."""

    def __init__(self, gallery: LiveGallery, looking: Looking) -> None:
        self._gallery = gallery
        self._looking = looking
        self._chunks: ChunkServer | None = None
        self._publish: Publish | None = None

    def attach(self, server: Any) -> Publish:
        """Serve predicted scores beside the viewer's server; return what publishes a layer."""
        chunks = ChunkServer(self._gallery.images, page_origin=f"http://{server.host}")
        server.other_origins.append(chunks.origin)
        server.answer("look", self.look)
        self._chunks = chunks
        self._publish = server.publish
        return self.url_of

    def url_of(self, location: Location) -> str:
        """Return the address of predicted scores, or of another layer."""
        assert self._chunks is not None
        assert self._publish is not None
        for field in self._gallery.fields:
            if self._gallery.place_of(field) == location:
                return self._chunks.url_of(self._gallery.name_of(field))
        return self._publish(location)

    def look(self, question: Mapping[str, Any]) -> Mapping[str, Any]:
        """Take over where a person looks, and return what the page should show.

        ``position`` maps axes to voxels of the world, and ``pixel`` is the size of a pixel in the
        smallest sides of a voxel.

        Raises:
            SettingsError: There is no such field.

        """
        assert self._chunks is not None
        field = str(question["field"])
        if field not in self._gallery.fields:
            raise SettingsError(f"there is no field {field!r}")
        name = self._gallery.name_of(field)
        image = self._gallery.images[name]
        scene = self._gallery.scene(field)
        image.look(sight_of(scene, image.image, question["position"], float(question["pixel"])))
        return {
            "status": self._looking.status,
            "is_problem": bool(self._looking.problem),
            "source": f"{self._chunks.url_of(name)}/|zarr3:",
        }

    def close(self) -> None:
        """Stop answering."""
        self._gallery.close()
        if self._chunks is not None:
            self._chunks.close()


def view_live(
    looking: Looking, source: str, announce: Callable[[str], None], *, browser: bool = True
) -> None:
    """Show a source, and predict scores where a person looks, until interrupted.

    ``announce`` is called with the URL of the page.

    Raises:
        SettingsError: Neuroglancer is not installed.
        TargetError: Another client works on the target.

    """
    drawing = find_drawing()
    with looking.open():
        gallery = LiveGallery(source, looking)
        live = Live(gallery, looking)
        try:
            gallery.scene(gallery.fields[0])
            asyncio.run(serve(drawing, gallery, announce, browser=browser, attach=live.attach))
        finally:
            live.close()


def sight_of(scene: Scene, image: Image, position: Mapping[str, float], pixel: float) -> Sight:
    """Return what is seen of predicted scores, from what the page tells.

    ``position`` is in voxels of the scene, and ``pixel`` the size of a pixel in the smallest side
    of such a voxel.
    """
    dimensions = scene.dimensions
    shown_scale, _ = scene.layers[0].image.transform()
    shown_names = scene.layers[0].image.axis_names
    center = []
    sizes: list[list[float]] = [[] for _ in image.levels]
    smallest = min(dimensions[name][0] for name in SPATIAL)
    own_scale, own_offset = image.transform()
    for name in SPATIAL:
        number = image.axis_names.index(name)
        step = abs(shown_scale[shown_names.index(name)]) or 1.0
        own_step = abs(own_scale[number]) or 1.0
        center.append((float(position[name]) * step - own_offset[number]) / own_step)
        for level, of_level in enumerate(sizes):
            level_scale, _ = image.transform(level)
            # In units of the smallest side of a voxel, as pixels are.
            of_level.append(abs(level_scale[number]) / step * dimensions[name][0] / smallest)
    return Sight(tuple(center), finest_shown(sizes, pixel))


def finest_shown(sizes: list[list[float]], pixel: float) -> int:
    """Return the finest level that Neuroglancer asks for.

    ``sizes`` are the sides of a voxel of each level, and ``pixel`` that of a pixel. It goes from
    the coarsest level to finer ones, until no side of a voxel is larger than a pixel.
    """
    level = len(sizes) - 1
    while level > 0:
        sides = zip(sizes[level], sizes[0], strict=True)
        if not any(side > pixel * _MARGIN and side > 1.01 * finest for side, finest in sides):
            break
        level -= 1
    return level

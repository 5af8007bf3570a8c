"""``megaseg view SOURCE --model NAME``: scores are predicted where one looks.

The page shows the image, and beside its layers the scores, which a server of its own
predicts. The page tells where a person looks, and is told what to know of what is seen.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.ngff.image import SPATIAL
from megaseg_dask.plan.command_line import command_line
from megaseg_dask.plan.resolved import Fixed
from megaseg_dask.plan.settings import Settings
from megaseg_dask.run.looking import Looking
from megaseg_dask.run.workspace import Readable
from megaseg_dask.tools.view.chunk_server import ChunkServer
from megaseg_dask.tools.view.gallery import SCORES, Gallery, Layer, Scene
from megaseg_dask.tools.view.neuroglancer_state import Urls
from megaseg_dask.tools.view.prediction import PredictedImage, Scores, Sight, WaitingList
from megaseg_dask.tools.view.server import Server
from megaseg_dask.tools.view.viewer import find_drawing, serve

# Neuroglancer counts a voxel as small enough if it is at most this much larger than a pixel.
_MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class PredictedLayer(Layer):
    """Scores that are predicted; ``name_at_server`` is that of their field."""

    predicted: PredictedImage | None = None
    name_at_server: str = ""

    def volume(self, level: int, t: int) -> Readable:
        """Return what is known of a level; all else is background."""
        assert self.predicted is not None
        return self.predicted.known_volume(level, t, self.channel)


class LiveGallery(Gallery):
    """The images of a source, with the scores that are predicted of them."""

    def __init__(
        self, source: str, looking: Looking, truth: str | None = None, *, unmarked: bool = False
    ) -> None:
        super().__init__(source, truth=truth, unmarked=unmarked)
        self._source = source
        self._looking = looking
        self._waiting = WaitingList(looking)
        self._scenes: dict[str, Scene] = {}
        scores = Scores()
        self.images: dict[str, PredictedImage] = {}
        self._names: dict[str, str] = {}
        for number, run in enumerate(looking.runs):
            for path in run.plan.images:
                name = str(len(self.images))
                self._names[path] = name
                self.images[name] = PredictedImage(looking, number, path, scores, self._waiting)
        # What cannot be predicted is not offered: a run would not write it either.
        self.fields = [field for field in self.fields if field in self._names]
        looking.changed = self._refresh

    def _refresh(self) -> None:
        for image in self.images.values():
            image.refresh()

    def scene(self, field: str) -> Scene:
        """Return the layers of a field, and the scores that are predicted of it."""
        if field not in self._scenes:
            scene = super().scene(field)
            self._scenes[field] = replace(scene, layers=(*scene.layers, *self._predicted(field)))
        return self._scenes[field]

    def _predicted(self, field: str) -> list[PredictedLayer]:
        name = self._names[field]
        predicted = self.images[name]
        run = self._looking.runs[predicted.number]
        threshold = run.plan.resolved.threshold
        image = predicted.image
        return [
            PredictedLayer(
                name=f"scores {channel_name}".strip(),
                kind=SCORES,
                location=run.plan.target / field,
                image=image,
                limits=(0.0, self._looking.max_score()),
                channel=channel,
                threshold=threshold.score if isinstance(threshold, Fixed) else 0.5,
                connectivity=run.plan.resolved.connectivity,
                predicted=predicted,
                name_at_server=name,
            )
            for channel, channel_name in enumerate(image.channel_names or ("",))
        ]

    def command(self, field: str) -> str:
        """Return the shell command that segments the source, or labels the target again."""
        settings = self._looking.plan.settings
        if self._looking.has_target:
            return command_line("relabel", self._looking.plan.target, settings=settings, options=())
        options = set(Settings.model_fields) - {"threshold", "label_name"}
        return command_line("segment", self._source, "TARGET", settings=settings, options=options)

    def foresee(self) -> None:
        """Predict what the page will show first, while a browser loads the page."""
        self.images[self._names[self.fields[0]]].foresee()

    def close(self) -> None:
        """Predict nothing more."""
        self._looking.stop()
        self._waiting.close()


class Live:
    """Answers what the page asks while scores are predicted."""

    def __init__(self, gallery: LiveGallery, looking: Looking) -> None:
        self._gallery = gallery
        self._looking = looking
        self._chunks: ChunkServer | None = None

    def attach(self, server: Server, urls: Urls) -> Urls:
        """Serve predicted scores beside the viewer's server; return where all is."""
        self._chunks = ChunkServer(self._gallery.images, page_origin=f"http://{server.host}")
        server.other_origins.append(self._chunks.origin)
        server.answer("look", self.look)
        return _LiveUrls(urls, self._chunks)

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
        scene = self._gallery.scene(field)
        layer = next(layer for layer in scene.layers if isinstance(layer, PredictedLayer))
        assert layer.predicted is not None
        sight = sight_of(scene, layer, question["position"], float(question["pixel"]))
        layer.predicted.look(sight)
        return {
            "status": self._looking.status,
            "is_problem": self._looking.is_problem,
            "source": f"{self._chunks.url_of(layer.name_at_server)}/|zarr3:",
        }

    def close(self) -> None:
        """Stop answering."""
        self._gallery.close()
        if self._chunks is not None:
            self._chunks.close()


class _LiveUrls:
    """Where the servers have what is drawn: predicted scores have one of their own."""

    def __init__(self, others: Urls, chunks: ChunkServer) -> None:
        self._others = others
        self._chunks = chunks

    def of(self, layer: Layer) -> str:
        if isinstance(layer, PredictedLayer):
            return self._chunks.url_of(layer.name_at_server)
        return self._others.of(layer)

    def backdrop_of(self, scene: Scene) -> str:
        return self._others.backdrop_of(scene)

    def outlines_of(self, layer: Layer) -> str:
        return self._others.outlines_of(layer)

    def meshes_of(self, layer: Layer, t: int) -> str:
        return self._others.meshes_of(layer, t)


def view_live(
    looking: Looking,
    source: str,
    announce: Callable[[str], None],
    *,
    truth: str | None = None,
    unmarked: bool = False,
    browser: bool = True,
) -> None:
    """Show a source, and predict scores where a person looks, until interrupted.

    ``truth`` names a label image that is shown too, which metadata mark as one unless it is
    ``unmarked``. ``announce`` is called with the URL of the page.

    Raises:
        SettingsError: Neuroglancer is not installed.
        TargetError: Another client works on the target.

    """
    drawing = find_drawing()
    with looking.open():
        gallery = LiveGallery(source, looking, truth, unmarked=unmarked)
        live = Live(gallery, looking)
        try:
            gallery.foresee()
            gallery.scene(gallery.fields[0])
            with suppress(KeyboardInterrupt):
                asyncio.run(serve(drawing, gallery, announce, browser=browser, attach=live.attach))
        finally:
            live.close()


def sight_of(scene: Scene, layer: Layer, position: Mapping[str, float], pixel: float) -> Sight:
    """Return what is seen of predicted scores, from what the page tells.

    ``position`` is in voxels of the scene, and ``pixel`` the size of a pixel in the smallest side
    of such a voxel.
    """
    at = scene.index_in(layer, position)
    smallest = min(scene.dimensions[name][0] for name in SPATIAL)
    finest, _ = layer.image.transform()
    sizes = []
    for level in range(len(layer.image.levels)):
        scale, _ = layer.image.transform(level)
        sides = []
        for name in SPATIAL:
            number = layer.image.axis_names.index(name)
            factor, _ = scene.world_of(layer, name)
            larger = abs(scale[number]) / (abs(finest[number]) or 1.0)
            # In the unit of pixels.
            sides.append(larger * factor * scene.dimensions[name][0] / smallest)
        sizes.append(sides)
    return Sight(tuple(at[name] for name in SPATIAL), finest_shown(sizes, pixel))


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

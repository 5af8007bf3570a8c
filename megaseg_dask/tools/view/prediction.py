"""Scores as an OME-Zarr image that does not exist: chunks are predicted when they are asked for.

The finest level is predicted, nearest the center of the view first. Coarser levels are
made of what is known of the finer ones, with the arithmetic of a run's pyramid; a coarse
chunk that the view shows at its own resolution is predicted too, if it takes few patches.
What is known is kept in memory up to a number of bytes, or is read from the target.
"""

import json
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from operator import truediv
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.algorithms.pyramids import Step, downsample
from megaseg_dask.ngff.image import SPATIAL, Image, image_attributes
from megaseg_dask.plan.plan import Output
from megaseg_dask.run.looked_at import LookedAt
from megaseg_dask.run.looking import Looking
from megaseg_dask.run.tasks.worker import describe

Array = NDArray[Any]

# Scores that are kept in memory, of all fields and levels.
SCORES_BYTES = 2**29
# Few patches touch a small box, so it is there soon. A GPU predicts patches faster than a
# browser asks for boxes.
_CHUNK_SHAPES: Mapping[str, Shape] = {"cpu": (64, 64, 64), "cuda": (64, 128, 128)}
# Of chunks that are near each other the one of fewer patches comes first: so many voxels to
# predict count as much as one voxel farther from the center.
_VOXELS_OF_DISTANCE = 2**15
_GATHER_S = 0.03
# A coarse chunk of more patches is shown as far as it is known, and not predicted.
_MAX_PATCHES = 64
_AXES = ("t", "c", *SPATIAL)
_CHUNK_KEY = re.compile(r"(\d{1,3})/c((?:/\d{1,9})+)", re.ASCII)
_METADATA_KEY = re.compile(r"(?:(\d{1,3})/)?zarr\.json", re.ASCII)
_VERSION = "0.5"


class Key(NamedTuple):
    """One chunk of one volume; ``is_exact`` says whether exact statistics normalize it."""

    volume: int
    is_exact: bool
    level: int
    position: Shape


@dataclass(frozen=True, slots=True)
class Sight:
    """What a person looks at: a point (z, y, x) of the finest level, and the level that is shown.

    ``level`` is the finest one that the viewer asks for.
    """

    center: tuple[float, ...]
    level: int


class Waiting:
    """A chunk that somebody waits for."""

    def __init__(self, rank: Callable[[], float], work: Callable[["Waiting"], bytes]) -> None:
        self.rank = rank
        self.work = work
        self.future: Future[bytes] = Future()
        self.is_dropped = False

    def drop(self) -> None:
        """Give it up: nobody waits any more."""
        self.is_dropped = True
        self.future.cancel()


class WaitingList:
    """One thread that predicts what is waited for, nearest the center of the view first."""

    def __init__(self, looking: Looking) -> None:
        self._looking = looking
        self._changed = threading.Condition()
        self._waiting: list[Waiting] = []
        self._is_over = False
        self._thread = threading.Thread(target=self._work, name="predicting", daemon=True)
        self._thread.start()

    def add(self, waiting: Waiting) -> None:
        """Predict a chunk in its turn."""
        with self._changed:
            self._waiting.append(waiting)
            self._changed.notify_all()

    def close(self) -> None:
        """Predict nothing more."""
        with self._changed:
            self._is_over = True
            for waiting in self._waiting:
                waiting.drop()
            self._changed.notify_all()
        # An engine that computes while the process ends would crash it.
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or bool(self._waiting))
            if self._is_over:
                return
            # A view asks for many chunks at once: the first to arrive need not be the first to do.
            time.sleep(_GATHER_S)
            # The tasks of a target wait until nobody else does.
            with self._looking.urgent():
                while (nearest := self._take()) is not None:
                    _carry_out(nearest)

    def _take(self) -> Waiting | None:
        with self._changed:
            self._waiting = [waiting for waiting in self._waiting if not waiting.is_dropped]
            if not self._waiting or self._is_over:
                return None
            nearest = min(self._waiting, key=lambda waiting: waiting.rank())
            self._waiting.remove(nearest)
            return nearest


def _carry_out(waiting: Waiting) -> None:
    if not waiting.future.set_running_or_notify_cancel():
        return
    try:
        waiting.future.set_result(waiting.work(waiting))
    except KeyboardInterrupt:
        # The end came.
        waiting.future.set_result(b"")
    except Exception as error:
        waiting.future.set_exception(error)


class Scores:
    """Chunks of scores ``(outputs, z, y, x)`` in memory, at most ``max_bytes`` of them."""

    def __init__(self, max_bytes: int = SCORES_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[object, Key], Array] = OrderedDict()
        self._lock = threading.Lock()
        self.n_bytes = 0

    def find(self, owner: object, key: Key) -> Array | None:
        """Return a chunk, if it is kept."""
        with self._lock:
            values = self._kept.get((owner, key))
            if values is not None:
                self._kept.move_to_end((owner, key))
            return values

    def keep(self, owner: object, key: Key, values: Array) -> None:
        """Keep a chunk."""
        with self._lock:
            if (owner, key) in self._kept:
                return
            self._kept[owner, key] = values
            self.n_bytes += values.nbytes
            while self.n_bytes > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.n_bytes -= oldest.nbytes


class PredictedImage:
    """The scores of one field of a run, of which chunks are predicted as they are asked for."""

    def __init__(
        self, looking: Looking, number: int, path: str, scores: Scores, waiting: WaitingList
    ) -> None:
        """Describe the scores of the field at ``path`` of a run of a request."""
        self._looking = looking
        self.number = number
        self._path = path
        self._scores = scores
        self._waiting = waiting
        plan = looking.runs[number].plan
        self.image = _in_order(plan.target_image_at(path), plan.resolved.scores_dtype)
        self._dtype = np.dtype(plan.resolved.scores_dtype)
        self.chunk_shape = _CHUNK_SHAPES[plan.engine.device]
        self._outputs = _outputs_at(looking.runs[number], path)
        self._sight: Sight | None = None
        # Chunks of coarser levels of which something may be known.
        self._touched: set[Key] = set()
        self._n_predicted = 0
        # How much was predicted when a chunk of a level was shown that was not complete.
        self._shown_incomplete: dict[int, int] = {}
        self.generation = 0

    # -- what is seen

    def look(self, sight: Sight) -> None:
        """Take over what a person looks at; what was shown too early is shown again."""
        self._sight = sight
        n_before = self._shown_incomplete.get(sight.level)
        if n_before is None:
            return
        if self._n_predicted > n_before or self._is_predicted(sight.level):
            self.refresh()

    def foresee(self) -> None:
        """Predict a part near the middle of the first volume before anybody asks for it.

        That is where the viewer opens.
        """
        shape = self.image.volume_shape()
        self._sight = Sight(tuple(n // 2 for n in shape), level=0)
        output = self._outputs[min(self._outputs)]
        near = Box.centered(tuple(2 * n for n in self.chunk_shape), shape)
        rank = partial(self._rank, output.volume, 0)
        nearest = min(self._grid(0).iter_overlapping(near), key=rank)
        work = partial(self._predict_chunk, output, 0, nearest)
        self._waiting.add(Waiting(partial(rank, nearest), work))

    def refresh(self) -> None:
        """Let the viewer ask for all chunks again, which it does if their address changes."""
        self._shown_incomplete.clear()
        self.generation += 1

    def report(self, error: Exception) -> None:
        """Let the page show why a chunk could not be predicted."""
        self._looking.trouble = describe(error)

    # -- objects of the image

    def document(self, key: str) -> bytes | None:
        """Return a metadata document of the image, or of one of its levels."""
        match = _METADATA_KEY.fullmatch(key)
        if match is None:
            return None
        if match[1] is None:
            attributes = image_attributes(self.image)
            document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        elif int(match[1]) < len(self.image.levels):
            document = self._array_document(int(match[1]))
        else:
            return None
        return json.dumps(document).encode()

    def _array_document(self, level: int) -> dict[str, object]:
        grid = {"name": "regular", "configuration": {"chunk_shape": self._stored_chunk}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.image.levels[level].shape),
            "data_type": self._dtype.name,
            "chunk_grid": grid,
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "dimension_names": list(self.image.axis_names),
            "attributes": {},
        }

    @property
    def _stored_chunk(self) -> list[int]:
        others = [1] * (len(self.image.axes) - len(SPATIAL))
        return [*others, *self.chunk_shape]

    def chunk(self, key: str) -> bytes | Waiting | None:
        """Return a chunk that is known, or what waits for one; none where nothing is known.

        Raises:
            MegasegError: It cannot be read.
        """
        found = self._parse(key)
        if found is None:
            return None
        output, level, position = found
        key_now = self._key(output.volume, level, position)
        values, is_whole = self._find(key_now)
        if not is_whole and self._is_predicted(level):
            waiting = Waiting(
                partial(self._rank, output.volume, level, position),
                partial(self._predict, output, level, position),
            )
            self._waiting.add(waiting)
            return waiting
        if is_whole:
            self._note(output, level, position)
        else:
            self._shown_incomplete[level] = self._n_predicted
        return None if values is None else self._encode(values, output)

    def _parse(self, key: str) -> tuple[Output, int, Shape] | None:
        """Return output, level and position of a chunk; none if there is no such chunk."""
        match = _CHUNK_KEY.fullmatch(key)
        if match is None or int(match[1]) >= len(self.image.levels):
            return None
        level = int(match[1])
        numbers = tuple(map(int, match[2].split("/")[1:]))
        if len(numbers) != len(self.image.axes):
            return None
        by_axis = dict(zip(self.image.axis_names, numbers, strict=True))
        position = tuple(by_axis[name] for name in SPATIAL)
        output = self._outputs.get((by_axis.get("t", 0), by_axis.get("c", 0)))
        limits = self._grid(level).grid_shape
        if output is None or any(n >= limit for n, limit in zip(position, limits, strict=True)):
            return None
        return output, level, position

    def _encode(self, values: Array, output: Output) -> bytes:
        """Return one output of a chunk as it is stored: chunks at the end are filled up."""
        whole = np.zeros(self.chunk_shape, self._dtype.newbyteorder("<"))
        inside = tuple(map(slice, values.shape[1:]))
        whole[inside] = values[output.number]
        return whole.tobytes()

    def known_volume(self, level: int, t: int, channel: int) -> "KnownVolume":
        """Return what is known of one output at a level, as a volume."""
        return KnownVolume(self, level, self._outputs[t, channel])

    def known_box(self, level: int, output: Output, box: Box) -> Array:
        """Return the scores of a box of a level; what is not known is 0."""
        result = np.zeros(box.shape, self._dtype)
        grid = self._grid(level)
        for position in grid.iter_overlapping(box):
            values, _ = self._find(self._key(output.volume, level, position))
            if values is not None:
                core = grid.core(position)
                shared = core & box
                inside = values[output.number][shared.within(core).slices]
                result[shared.within(box).slices] = inside
        return result

    # -- where chunks are

    @property
    def _run(self) -> LookedAt:
        return self._looking.runs[self.number]

    def box(self, level: int, position: Shape) -> Box:
        """Return the voxels ``(z, y, x)`` of a chunk, at its level."""
        return self._grid(level).core(position)

    def _grid(self, level: int) -> BlockGrid:
        return BlockGrid(self.image.volume_shape(level), self.chunk_shape)

    def _step(self, level: int) -> Step:
        """Return how a level follows from the finer one."""
        image = self.image
        fine = image.spatial(image.levels[level - 1].scale)
        coarse = image.spatial(image.levels[level].scale)
        factors = tuple(map(truediv, coarse, fine)) if all(fine) else None
        return Step(image.volume_shape(level - 1), image.volume_shape(level), factors)

    def _finest_box(self, level: int, box: Box) -> Box:
        """Return the voxels of the finest level of which a box of a level is made."""
        for coarser in range(level, 0, -1):
            box = self._step(coarser).source_box(box)
        return box

    def _rank(self, volume: int, level: int, position: Shape) -> float:
        """Return when a chunk is predicted: the smallest rank of those that are waited for first.

        It is the distance from where a person looks, in voxels of the finest level, and more for
        a chunk that takes more patches.
        """
        box = self._finest_box(level, self.box(level, position))
        n_patches = self._run.count_missing(volume, box)
        n_voxels = n_patches * math.prod(self._run.plan.patch_grid.patch_shape)
        return self._distance(box) + n_voxels / _VOXELS_OF_DISTANCE

    def _distance(self, box: Box) -> float:
        if self._sight is None:
            return 0.0
        at = self._sight.center
        # The plane that is seen goes through the center: a chunk that it cuts comes first.
        sides = zip(box.start, box.stop, at, strict=True)
        beyond = [max(start - here, 0.0, here - stop) for start, stop, here in sides]
        return math.hypot(*beyond)

    def _is_predicted(self, level: int) -> bool:
        """Return whether chunks of a level are predicted where they are not known."""
        if level == 0:
            return True
        if self._sight is None or level > self._sight.level:
            return False
        first = self._grid(level).core((0,) * len(SPATIAL))
        box = self._finest_box(level, first)
        return self._run.plan.patch_grid.count_touching(box) <= _MAX_PATCHES

    # -- what is known

    def _key(self, volume: int, level: int, position: Shape) -> Key:
        known = self._run.known(volume)
        return Key(volume, known is None or known.is_exact, level, position)

    def _find(self, key: Key) -> tuple[Array | None, bool]:
        """Return what is known of a chunk, and whether that is all of it."""
        values = self._scores.find(self._run, key)
        if values is not None:
            return values, True
        box = self.box(key.level, key.position)
        if key.level == 0:
            values = self._run.stored(key.volume, box) if key.is_exact else None
            if values is None:
                return None, False
            self._keep(key, values)
            return values, True
        if key not in self._touched and not self._is_any_stored(key, box):
            return None, False
        return self._reduce(key, box)

    def _is_any_stored(self, key: Key, box: Box) -> bool:
        finest = self._finest_box(key.level, box)
        return key.is_exact and self._run.is_any_done(key.volume, finest)

    def _reduce(self, key: Key, box: Box) -> tuple[Array, bool]:
        """Compute a chunk from those of the finer level; what is not known is background."""
        step = self._step(key.level)
        fine_box = step.source_box(box)
        n_outputs = len(self._run.plan.model.outputs)
        fine = np.zeros((n_outputs, *fine_box.shape), self._dtype)
        is_whole = True
        grid = self._grid(key.level - 1)
        for position in grid.iter_overlapping(fine_box):
            child = key._replace(level=key.level - 1, position=position)
            values, is_known = self._find(child)
            is_whole = is_whole and is_known
            if values is not None:
                core = grid.core(position)
                shared = core & fine_box
                within_fine = shared.within(fine_box).slices
                fine[:, *within_fine] = values[:, *shared.within(core).slices]
        reduced = np.stack([downsample(values, fine_box, box, step, mode=False) for values in fine])
        if is_whole:
            self._scores.keep(self._run, key, reduced)
        return reduced, is_whole

    def _keep(self, key: Key, values: Array) -> None:
        self._scores.keep(self._run, key, values)
        self._touched.update(self._above(key))

    def _above(self, key: Key) -> Iterator[Key]:
        """Yield the chunks of coarser levels that a chunk may be a part of."""
        box = self.box(0, key.position)
        for level in range(1, len(self.image.levels)):
            shape = self.image.volume_shape(level)
            ranges = []
            axes = zip(
                box.start, box.stop, self.image.volume_shape(), shape, self.chunk_shape, strict=True
            )
            for start, stop, n_fine, n_coarse, chunk in axes:
                # One voxel more on both sides: a level need not have a whole factor.
                first = max(start * n_coarse // n_fine - 1, 0)
                last = min(stop * n_coarse // n_fine + 1, n_coarse - 1)
                ranges.append(range(first // chunk, last // chunk + 1))
            for position in product(*ranges):
                yield key._replace(level=level, position=position)

    # -- what is predicted

    def _predict(self, output: Output, level: int, position: Shape, waiting: Waiting) -> bytes:
        """Predict a chunk that somebody looks at; of a coarse one, all that it is made of."""
        chunk = self._predict_chunk(output, level, position, waiting)
        if chunk:
            self._note(output, level, position)
        return chunk

    def _note(self, output: Output, level: int, position: Shape) -> None:
        box = self._finest_box(level, self.box(level, position))
        self._looking.note(self.number, output.volume, box)

    def _predict_chunk(
        self, output: Output, level: int, position: Shape, waiting: Waiting
    ) -> bytes:
        known = self._looking.statistics(self.number, output.volume)
        key = Key(output.volume, known.is_exact, level, position)
        grid = self._grid(0)
        box = self._finest_box(level, self.box(level, position))
        finest = sorted(grid.iter_overlapping(box), key=lambda p: self._distance(grid.core(p)))
        for part in (key._replace(level=0, position=each) for each in finest):
            if waiting.is_dropped:
                return b""
            if not self._find(part)[1]:
                core = grid.core(part.position)
                values = self._looking.predict(self.number, output.volume, core, known)
                self._keep(part, values)
                self._n_predicted += 1
        whole, _ = self._find(key)
        assert whole is not None
        if self._looking.trouble:
            # It may be over: what failed is asked for again.
            self._looking.trouble = ""
            self.refresh()
        return self._encode(whole, output)


@dataclass(frozen=True, slots=True)
class KnownVolume:
    """What is known of one output of a volume at a level."""

    image: PredictedImage
    level: int
    output: Output

    def read(self, box: Box) -> Array:
        """Return the voxels of a box, ``(z, y, x)``; what is not known is 0."""
        return self.image.known_box(self.level, self.output, box)


def _in_order(image: Image, dtype: str) -> Image:
    """Return an image of the version that is served, with axes t, c, z, y, x."""
    order = [image.axis_names.index(name) for name in _AXES if name in image.axis_names]

    def ordered(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in order) if values else ()

    levels = tuple(
        replace(
            level,
            path=str(number),
            shape=ordered(level.shape),
            scale=ordered(level.scale),
            translation=ordered(level.translation),
        )
        for number, level in enumerate(image.levels)
    )
    return replace(
        image,
        version=_VERSION,
        zarr_format=3,
        axes=ordered(image.axes),
        levels=levels,
        scale=ordered(image.scale),
        translation=ordered(image.translation),
        kind="scores",
        dtype=dtype,
    )


def _outputs_at(run: LookedAt, path: str) -> dict[tuple[int, int], Output]:
    """Return the output at each timepoint and channel of the scores of a field."""
    plan = run.plan
    outputs = {}
    for volume, planned in enumerate(plan.volumes):
        if planned.image == path:
            for output in plan.outputs_of(volume):
                outputs[planned.target_t, plan.target_channel(output)] = output
    return outputs

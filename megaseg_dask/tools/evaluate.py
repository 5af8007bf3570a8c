"""Score a label image on a store against the truth, block by block.

Only a table of touching pairs of objects is kept, and tables add, so images of
any size can be compared. Ids start again in each timepoint: each has a table of
its own. Voxels with a negative id in the truth are not annotated, and are left out.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.geometry import BlockGrid, Box, Shape
from megaseg_dask.algorithms.lineages import Lineage, TrackScores, score_tracks
from megaseg_dask.algorithms.matching import Contingency, Evaluation, evaluate_contingency
from megaseg_dask.errors import DataError, SettingsError, SourceError
from megaseg_dask.messages import one_line
from megaseg_dask.ngff.foreign import TIFF_SUFFIXES
from megaseg_dask.ngff.image import Image
from megaseg_dask.ngff.labels import choose_label, read_label_image, require_marked
from megaseg_dask.ngff.plate import is_plate
from megaseg_dask.ngff.tracks import SUFFIX, read_tracks, require_geff
from megaseg_dask.ngff.volume import Volume
from megaseg_dask.run.target.provenance import missing_at
from megaseg_dask.run.target.tracks import tracks_at
from megaseg_dask.stores import Location
from megaseg_dask.tools.importing.files import open_file
from megaseg_dask.tools.training.checks import has_areas

BLOCK_SHAPE = (64, 512, 512)
_TEXT_FORM = "expected four integers (label, first and last timepoint, parent)"
# Sizes of voxels that differ by less are written with other digits.
_SAME_SIZE = 0.01


def find_labels(address: str, name: str | None = None) -> Location:
    """Return the label image at an address: the address itself, or a label image of its image.

    Raises:
        SourceError: if nothing is there.
        SettingsError: if ``name`` is missing, or is needed to choose one of several.
    """
    location = Location.of(address)
    if not location.exists():
        raise SourceError(f"{location} does not exist{location.hint()}; check the path")
    if is_tiff(location):
        return location
    return choose_label(location, name) or location


def require_labels(location: Location) -> None:
    """Check that the voxels of an image are ids of objects, as its metadata say.

    A TIFF file cannot say it: its middle planes are looked at.

    Raises:
        SourceError: They do not, or look like intensities.
    """
    if is_tiff(location):
        with closing(_TiffLabels(location)) as labels:
            if not has_areas(labels.read(0, labels.middle())):
                raise SourceError(
                    f"{location} looks like intensities: its neighboring voxels differ; give the "
                    "file of the labels, or pass --unmarked if its voxels are ids of objects"
                )
        return
    require_marked(location, read_label_image(location))


def is_tiff(location: Location) -> bool:
    """Return whether a TIFF file of this machine is at a location."""
    if not location.is_local or not location.path.is_file():
        return False
    return location.path.suffix.lower() in TIFF_SUFFIXES


def evaluate_images(
    predicted: Location,
    truth: Location,
    block_shape: Shape = BLOCK_SHAPE,
    *,
    ignored: Sequence[int] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Compare two label images of one shape, all timepoints together; any block gives the same.

    Voxels that one of them lacks because tasks of its run failed are left out, and counted. So are
    those that the truth does not annotate: with a negative id, or one of ``ignored``. ``tell`` is
    called with what makes the comparison doubtful.

    Raises:
        SourceError: for images of different shapes, without a voxel in common, or whose voxels are
            no integers; for a predicted id below 0.
        MegasegError: if one of them cannot be read.
    """
    return evaluation_of(compare_images(predicted, truth, block_shape, ignored=ignored, tell=tell))


def compare_images(
    predicted: Location,
    truth: Location,
    block_shape: Shape = BLOCK_SHAPE,
    *,
    ignored: Sequence[int] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> "Comparison":
    """Return the tables of two label images, which all scores are computed of.

    Raises:
        SourceError: As :func:`evaluate_images`.
    """
    with closing(_open(predicted)) as ours, closing(_open(truth)) as theirs:
        if ours.shape != theirs.shape:
            shapes = f"{predicted} has {ours.shape}, {truth} has {theirs.shape}"
            raise SourceError(f"shapes (t, z, y, x) differ: {shapes}")
        if difference := _differing_place(ours, theirs):
            tell(f"{predicted} and {truth} {difference}; are these the same voxels?")
        n_times, *volume_shape = ours.shape
        comparison = Comparison(predicted, truth, [Contingency.none()] * n_times)
        for t in range(n_times):
            for box in BlockGrid(tuple(volume_shape), block_shape):
                try:
                    comparison.add(ours, theirs, t, box, ignored)
                except DataError as error:
                    raise SourceError(f"{predicted}: {error}") from error
    for unseen in sorted(set(ignored) - comparison.seen):
        tell(f"--ignore {unseen}: {truth} has no voxel of this id")
    return comparison


def evaluation_of(comparison: "Comparison") -> Evaluation:
    """Return the scores of objects, all timepoints together.

    Raises:
        SourceError: No voxel can be compared.
    """
    table = Contingency.joined(comparison.tables)
    if not len(table.voxels):
        if comparison.n_not_annotated:
            raise SourceError(f"{comparison.truth} annotates no voxel; expected ids of 0 and above")
        raise SourceError(
            f"{comparison.predicted} lacks all voxels: its run failed; fix the cause, and run the "
            "same megaseg segment command again"
        )
    return replace(
        evaluate_contingency(table),
        left_out_voxels=comparison.n_lacking,
        not_annotated_voxels=comparison.n_not_annotated,
    )


@dataclass(slots=True)
class Comparison:
    """Two label images, and the table of each timepoint."""

    predicted: Location
    truth: Location
    tables: list[Contingency]
    n_lacking: int = 0
    n_not_annotated: int = 0
    # Those of the ignored ids that are there.
    seen: set[int] = field(default_factory=set)

    def add(
        self, ours: "_Readable", theirs: "_Readable", t: int, box: Box, ignored: Sequence[int]
    ) -> None:
        """Add a box of a timepoint.

        Raises:
            DataError: A predicted id is below 0.
        """
        is_there = ours.has(t, box) & theirs.has(t, box)
        self.n_lacking += int((~is_there).sum())
        true = theirs.read(t, box)[is_there]
        is_annotated = true >= 0
        for value in ignored:
            is_ignored = true == value
            if is_ignored.any():
                self.seen.add(value)
                is_annotated &= ~is_ignored
        self.n_not_annotated += int((~is_annotated).sum())
        predicted = ours.read(t, box)[is_there][is_annotated]
        # Negative ids are left out above, so that no value is lost.
        self.tables[t] += Contingency.of(predicted, true[is_annotated].astype(np.uint64))


def find_tracks(labels: Location) -> Location:
    """Return where ``megaseg track`` writes the tracks of a label image of an image.

    Those of a field lie beside the plate, unless the run was one of the field alone.
    """
    image = labels.parent.parent
    own = tracks_at(image, "", labels.basename)
    plate = image.parent.parent.parent
    if own.exists() or not is_plate(plate):
        return own
    field = image.path_below(plate)
    return tracks_at(plate, field, labels.basename)


def score_lineages(comparison: Comparison, tracks: Location, true_tracks: Location) -> TrackScores:
    """Compare tracks of predicted labels with true ones: TRA and LNK.

    ``tracks`` are GEFF. ``true_tracks`` are GEFF too, or a text file of the Cell Tracking
    Challenge: label, first and last timepoint, parent; the ids of the true labels are then those
    of tracks.

    Raises:
        SettingsError: The package that reads GEFF is missing.
        SourceError: Tracks cannot be read, or are those of other labels.
    """
    found = _read_lineage(tracks)
    if true_tracks.basename.endswith(SUFFIX):
        expected = _read_lineage(true_tracks)
    else:
        expected = _lineage_of_text(true_tracks, comparison)
    try:
        return score_tracks(found, expected, comparison.tables)
    except DataError as error:
        raise SourceError(f"{tracks} and {true_tracks} do not fit the labels: {error}") from error


def _read_lineage(location: Location) -> Lineage:
    require_geff()
    if not location.exists():
        raise SourceError(
            f"{location} does not exist{location.hint()}; run megaseg track first, or name tracks "
            "with --tracks"
        )
    graph = read_tracks(location)
    time = graph.nodes["t"].astype(np.int64)
    return Lineage.of(time, graph.nodes["label"].astype(np.uint64), graph.links)


def _lineage_of_text(location: Location, comparison: Comparison) -> Lineage:
    ids = [np.setdiff1d(table.true, 0) for table in comparison.tables]
    try:
        return Lineage.of_tracks(ids, _read_text(location))
    except DataError as error:
        raise SourceError(f"{location} does not fit {comparison.truth}: {error}") from error


def _read_text(location: Location) -> NDArray[np.int64]:
    """Return rows of label, first and last timepoint, and parent."""
    data = location.parent.get(location.basename)
    if data is None:
        if location.exists():
            raise SourceError(f"{location} is a folder; expected a text file, or NAME{SUFFIX}")
        raise SourceError(f"{location} does not exist{location.hint()}; check the path")
    rows = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        # As for NumPy, whose files these are: what follows # is a comment.
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            row = np.array(words, np.int64)
        except (ValueError, OverflowError):
            row = np.empty(0, np.int64)
        if row.size != 4:
            raise SourceError(f"{location}, line {number}: {_TEXT_FORM}, found {one_line(line)!r}")
        rows.append(row)
    return np.array(rows, np.int64).reshape(-1, 4)


def _differing_place(ours: "_Readable", theirs: "_Readable") -> str:
    """Return how sizes or places of voxels differ, in words; empty if they do not.

    Of a TIFF file, or of voxels of unknown size, nothing is known.
    """
    if not (isinstance(ours, _Labels) and isinstance(theirs, _Labels)):
        return ""
    images = (ours.image, theirs.image)
    if any(image.unknown_size is not None for image in images):
        return ""
    sizes = [np.array(image.spacing_um) for image in images]
    origins = [np.array(image.origin_um) for image in images]
    if not np.allclose(sizes[0], sizes[1], rtol=_SAME_SIZE, atol=0):
        return "have voxels of other sizes: {} and {} µm (z, y, x)".format(*map(_texts, sizes))
    # What half a voxel is apart are other voxels.
    if np.any(np.abs(origins[0] - origins[1]) > sizes[0] / 2):
        return "begin at other places: {} and {} µm (z, y, x)".format(*map(_texts, origins))
    return ""


def _texts(values: NDArray[np.float64]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


class _Readable(Protocol):
    """Labels of one or more timepoints."""

    @property
    def shape(self) -> Shape:
        """Extents (t, z, y, x)."""
        ...

    def has(self, t: int, box: Box) -> NDArray[np.bool_]:
        """Return which voxels ``(z, y, x)`` of a box were computed."""
        ...

    def read(self, t: int, box: Box) -> NDArray[Any]:
        """Return labels ``(z, y, x)``, integers as they are stored."""
        ...

    def close(self) -> None:
        """Close the file, if it is one."""
        ...


def _open(location: Location) -> _Readable:
    if is_tiff(location):
        return _TiffLabels(location)
    return _Labels.open(location)


@dataclass(frozen=True, slots=True)
class _Labels:
    """A label image of OME-Zarr."""

    location: Location
    image: Image
    missing: Sequence[tuple[int, Box]]

    @classmethod
    def open(cls, location: Location) -> "_Labels":
        image = read_label_image(location)
        n_channels = image.extent("c")
        if n_channels > 1:
            raise SourceError(
                f"{location} has {n_channels} channels; expected a label image with one. Give each "
                "channel a label image of its own"
            )
        return cls(location, image, missing_at(location))

    def close(self) -> None:
        """Close nothing: arrays stay open."""

    @property
    def shape(self) -> Shape:
        """Extents (t, z, y, x)."""
        return (self.image.extent("t"), *self.image.volume_shape())

    def has(self, t: int, box: Box) -> NDArray[np.bool_]:
        """Return which voxels ``(z, y, x)`` of a box were computed."""
        is_there = np.ones(box.shape, bool)
        for time, lost in self.missing:
            common = box & lost
            if time == t and min(common.shape) > 0:
                is_there[common.within(box).slices] = False
        return is_there

    def read(self, t: int, box: Box) -> NDArray[Any]:
        """Return labels ``(z, y, x)``, integers as they are stored."""
        return Volume.of(self.location, self.image, t=t).read(box)


class _TiffLabels:
    """Labels in a TIFF file; of one that does not say its axes, the first of three is z."""

    def __init__(self, location: Location) -> None:
        try:
            self._file = open_file(location.path)
        except SettingsError:
            self._file = open_file(location.path, axes="ZYX")
        contents = self._file.contents
        n_times, n_channels, *spatial = contents.shape
        if n_channels > 1 or np.dtype(contents.dtype).kind not in "iub":
            self._file.close()
            raise SourceError(
                f"{location} has {n_channels} channels of {contents.dtype}; labels are integers, "
                "in one channel"
            )
        self.shape: Shape = (n_times, *spatial)

    def middle(self) -> Box:
        """Return the middle planes."""
        _, depth, height, width = self.shape
        first = (depth - 1) // 2
        return Box((first, 0, 0), (min(first + 2, depth), height, width))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def has(self, t: int, box: Box) -> NDArray[np.bool_]:
        """Return that all voxels of a box are there."""
        return np.ones(box.shape, bool)

    def read(self, t: int, box: Box) -> NDArray[Any]:
        """Return labels ``(z, y, x)``, integers as they are stored."""
        _, rows, columns = box.slices
        planes = range(box.start[0], box.stop[0])
        return np.stack([self._file.read_plane(t, 0, z, rows, columns) for z in planes])

"""How good a label image is: overlap of the foreground, matching of the objects.

Everything derives from one sparse table of how many voxels each predicted
label shares with each true one. Such tables add, so a label image of any size
is evaluated block by block, as long as ids are those of the whole volume.

Where a ratio would be 0/0 (nothing predicted, nothing true) it is 0, not 1 and
not NaN: StarDist's convention (`stardist.matching`), kept for the foreground
too. The counts beside it tell such a case from a bad prediction.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megaseg_dask.errors import DataError, SettingsError

# Decimal literals: an IoU that equals a threshold as a fraction then equals it
# as a float64 too (both are the double nearest to that fraction).
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)

# What corrections of objects cost in the Cell Tracking Challenge.
MISSED = 10
NOT_SPLIT = 5
TOO_MANY = 1


@dataclass(frozen=True, slots=True, eq=False)
class Contingency:
    """Voxels shared by each pair of labels that meet, 0 (background) included.

    Three arrays of one length: ids (uint64) and voxel counts (int64), sorted by
    (predicted, true), each pair once. The table grows with the number of pairs,
    never with the largest id.
    """

    predicted: NDArray[np.uint64]
    true: NDArray[np.uint64]
    voxels: NDArray[np.int64]

    @classmethod
    def none(cls) -> "Contingency":
        """Return the table of no voxels: the start of a sum."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))

    @classmethod
    def of(cls, predicted: ArrayLike, true: ArrayLike) -> "Contingency":
        """Count the pairs of two label images (integers or bool, any equal shape).

        Raises:
            DataError: The shapes differ, an id is negative, or a dtype is no integer.
        """
        predicted = _require_labels(np.asarray(predicted))
        true = _require_labels(np.asarray(true))
        if predicted.shape != true.shape:
            raise DataError(
                f"predicted labels have shape {predicted.shape}, true ones {true.shape}"
            )
        predicted = predicted.ravel()
        true = true.ravel()
        if not predicted.size:
            return cls.none()
        # Labels come in runs along a row: sorting runs instead of voxels is far cheaper.
        starts = _run_starts(predicted, true)
        lengths = np.diff(starts, append=predicted.size).astype(np.int64)
        return cls._merged(
            predicted[starts].astype(np.uint64), true[starts].astype(np.uint64), lengths
        )

    def __add__(self, other: "Contingency") -> "Contingency":
        """Add the table of other voxels of the same two label images; exact, in any order."""
        return self.sum_of([self, other])

    @classmethod
    def sum_of(cls, tables: Sequence["Contingency"]) -> "Contingency":
        """Add the tables of other voxels of the same two label images, at least one, at once."""
        return cls._merged(
            np.concatenate([table.predicted for table in tables]),
            np.concatenate([table.true for table in tables]),
            np.concatenate([table.voxels for table in tables]),
        )

    @classmethod
    def joined(cls, tables: Iterable["Contingency"]) -> "Contingency":
        """Return one table of several images, where an id of one is not that id of another.

        Objects are numbered anew; background stays 0.
        """
        result = cls.none()
        for table in tables:
            predicted = _numbered(table.predicted, int(result.predicted.max(initial=0)))
            true = _numbered(table.true, int(result.true.max(initial=0)))
            result = result + cls(predicted, true, table.voxels)
        return result

    @classmethod
    def _merged(
        cls, predicted: NDArray[np.uint64], true: NDArray[np.uint64], voxels: NDArray[np.int64]
    ) -> "Contingency":
        if not len(voxels):
            return cls.none()
        order = np.lexsort((true, predicted))
        predicted = predicted[order]
        true = true[order]
        starts = _run_starts(predicted, true)
        return cls(predicted[starts], true[starts], np.add.reduceat(voxels[order], starts))


def _numbered(ids: NDArray[np.uint64], n_before: int) -> NDArray[np.uint64]:
    """Return consecutive numbers after ``n_before`` for the ids above 0."""
    _, numbers = np.unique(np.append(ids, np.uint64(0)), return_inverse=True)
    numbers = numbers[:-1].astype(np.uint64)
    return np.where(numbers > 0, numbers + np.uint64(n_before), np.uint64(0))


def _run_starts(predicted: NDArray[Any], true: NDArray[Any]) -> NDArray[np.intp]:
    """Return where a pair differs from the one before it; the first always does."""
    changes = (predicted[1:] != predicted[:-1]) | (true[1:] != true[:-1])
    return np.concatenate([np.zeros(1, np.intp), np.flatnonzero(changes) + 1])


@dataclass(frozen=True, slots=True)
class Matching:
    """Objects matched one to one where their IoU reaches a threshold.

    `average_precision` is TP / (TP + FP + FN), as in the 2018 Data Science Bowl
    and StarDist ("accuracy" there).
    """

    threshold: float
    true_positives: int
    false_positives: int
    false_negatives: int
    average_precision: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of predicted labels against true ones; all ratios are in 0..1.

    Dice, IoU, precision and recall are those of the foreground (id > 0), counted
    in voxels. Panoptic quality = segmentation quality (mean IoU of the matched)
    times recognition quality (F1 of the objects), at IoU 0.5: Kirillov et al.,
    "Panoptic Segmentation", CVPR 2019, but an IoU of exactly 0.5 matches, as in
    StarDist. A true object is split if more than half of the voxels of two or more
    predicted objects lie in it; a predicted object is merged if more than half of
    the voxels of two or more true objects lie in it.

    SEG and DET are those of the Cell Tracking Challenge (Ulman et al., "An objective comparison of
    cell-tracking algorithms", Nature Methods 2017; Matula et al., "Cell tracking accuracy
    measurement based on comparison of acyclic oriented graphs", PLOS ONE 2015). A predicted object
    is that of a true one if it covers more than half of it. SEG is the mean IoU of these pairs over
    all true objects, 0 for those without. DET is 1 less the cost of the corrections, as a share of
    that of adding all true objects: 10 for one that is missed, 5 for each one too many that a
    predicted object covers, 1 for a predicted object that covers none.
    """

    dice: float
    iou: float
    precision: float
    recall: float
    n_predicted: int
    n_true: int
    n_split: int
    n_merged: int
    mean_average_precision: float
    panoptic_quality: float
    segmentation_quality: float
    recognition_quality: float
    seg: float
    det: float
    matchings: tuple[Matching, ...]
    # Voxels that were not compared, because one of the images lacks them.
    left_out_voxels: int = 0
    # Voxels that were not compared, because the truth says nothing about them.
    not_annotated_voxels: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return all fields by name, as plain Python values that are ready for JSON."""
        return asdict(self) | {"matchings": [asdict(matching) for matching in self.matchings]}


def evaluate(
    predicted: ArrayLike, true: ArrayLike, thresholds: Sequence[float] = THRESHOLDS
) -> Evaluation:
    """Compare two label images of one shape (integers, 0 is background; bool is one object).

    Raises:
        DataError: The images are no label images of one shape.
        SettingsError: A threshold lies outside 0.5..1, or there is none.
    """
    return evaluate_contingency(Contingency.of(predicted, true), thresholds)


def evaluate_contingency(
    table: Contingency, thresholds: Sequence[float] = THRESHOLDS
) -> Evaluation:
    """Score a whole volume's table; `evaluate` block by block ends here.

    Raises:
        SettingsError: A threshold lies outside 0.5..1, or there is none.
    """
    if not thresholds or not all(0.5 <= threshold <= 1 for threshold in thresholds):
        raise SettingsError(f"IoU thresholds must be between 0.5 and 1, found {tuple(thresholds)}")
    matched = _matched_ious(table)
    n_matched = len(matched)
    n_predicted = _n_objects(table.predicted)
    n_true = _n_objects(table.true)
    matchings = tuple(_match(matched, threshold, n_predicted, n_true) for threshold in thresholds)
    segmentation = _ratio(float(matched.sum()), n_matched)
    recognition = _ratio(2 * n_matched, n_predicted + n_true)
    is_predicted = table.predicted > 0
    is_true = table.true > 0
    in_predicted = int(table.voxels[is_predicted].sum())
    in_true = int(table.voxels[is_true].sum())
    shared = int(table.voxels[is_predicted & is_true].sum())
    return Evaluation(
        dice=_ratio(2 * shared, in_predicted + in_true),
        iou=_ratio(shared, in_predicted + in_true - shared),
        precision=_ratio(shared, in_predicted),
        recall=_ratio(shared, in_true),
        n_predicted=n_predicted,
        n_true=n_true,
        n_split=_n_shared(table.true, table.predicted, table.voxels),
        n_merged=_n_shared(table.predicted, table.true, table.voxels),
        mean_average_precision=float(
            np.mean([matching.average_precision for matching in matchings])
        ),
        panoptic_quality=segmentation * recognition,
        segmentation_quality=segmentation,
        recognition_quality=recognition,
        seg=_ratio(float(list_covering(table)[1].sum()), n_true),
        det=_detection(table, n_predicted, n_true),
        matchings=matchings,
    )


def list_covering(table: Contingency) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the rows whose predicted object covers more than half of the true one, and their IoU.

    Each true object is in one row at most, as in the Cell Tracking Challenge.
    """
    in_predicted = _object_voxels(table.predicted, table.voxels)
    in_true = _object_voxels(table.true, table.voxels)
    is_pair = (table.predicted > 0) & (table.true > 0) & (2 * table.voxels > in_true)
    rows = np.flatnonzero(is_pair)
    shared = table.voxels[rows]
    return rows, shared / (in_predicted[rows] + in_true[rows] - shared)


def _detection(table: Contingency, n_predicted: int, n_true: int) -> float:
    """Return DET."""
    covering, _ = list_covering(table)
    n_covered = len(covering)
    n_covering = len(np.unique(table.predicted[covering]))
    cost = (
        MISSED * (n_true - n_covered)
        + NOT_SPLIT * (n_covered - n_covering)
        + TOO_MANY * (n_predicted - n_covering)
    )
    worst = MISSED * n_true
    return _ratio(worst - min(cost, worst), worst)


def _matched_ious(table: Contingency) -> NDArray[np.float64]:
    """Return the IoU of each matched pair of objects, from 0.5 upwards.

    Each object is in one pair at most.
    """
    both = (table.predicted > 0) & (table.true > 0)
    shared = table.voxels[both]
    n_predicted = _object_voxels(table.predicted, table.voxels)[both]
    n_true = _object_voxels(table.true, table.voxels)[both]
    ious = shared / (n_predicted + n_true - shared)
    candidates = np.flatnonzero(ious >= 0.5)
    # Above 0.5 an object has one partner only. At exactly 0.5 it can have two: the
    # halves that make it up, which touch no other object. Either half is then a best
    # assignment, so keeping the first pair of each object needs no solver.
    for ids in (table.predicted[both], table.true[both]):
        _, first = np.unique(ids[candidates], return_index=True)
        candidates = candidates[first]
    matched: NDArray[np.float64] = ious[candidates]
    return matched


def _object_voxels(ids: NDArray[np.uint64], voxels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the voxels of the whole object, for each row of the table."""
    _, rows = np.unique(ids, return_inverse=True)
    object_voxels = np.zeros(len(ids), np.int64)
    np.add.at(object_voxels, rows, voxels)
    return object_voxels[rows]


def _n_shared(
    whole: NDArray[np.uint64], parts: NDArray[np.uint64], voxels: NDArray[np.int64]
) -> int:
    """Return in how many of the objects ``whole`` two or more of ``parts`` mainly lie."""
    is_mainly = 2 * voxels > _object_voxels(parts, voxels)
    _, n_parts = np.unique(whole[is_mainly & (whole > 0) & (parts > 0)], return_counts=True)
    return int(np.count_nonzero(n_parts > 1))


def _match(
    matched: NDArray[np.float64], threshold: float, n_predicted: int, n_true: int
) -> Matching:
    n = int(np.count_nonzero(matched >= threshold))
    return Matching(threshold, n, n_predicted - n, n_true - n, _ratio(n, n_predicted + n_true - n))


def _n_objects(ids: NDArray[np.uint64]) -> int:
    return int(np.count_nonzero(np.unique(ids)))


def _ratio(part: float, whole: float) -> float:
    if not whole:
        return 0.0
    return float(part / whole)


def _require_labels(labels: NDArray[Any]) -> NDArray[Any]:
    if labels.dtype.kind not in "biu":
        raise DataError(f"labels must be integers, found {labels.dtype}")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise DataError(f"labels must not be negative, found {labels.min()}")
    return labels

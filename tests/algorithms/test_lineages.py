"""Lineages of label images: which lists of tracks do not fit them."""

import numpy as np
import pytest

from megaseg_dask.algorithms.lineages import Lineage
from megaseg_dask.errors import DataError

IDS = [np.array(ids, np.uint64) for ids in ([1, 2], [1, 2], [1, 3, 4])]
ROWS = [[1, 0, 2, 0], [2, 0, 1, 0], [3, 2, 2, 2], [4, 2, 2, 2]]


def lineage_of(rows):
    return Lineage.of_tracks(IDS, np.array(rows, np.int64).reshape(-1, 4))


def test_objects_without_voxels_are_no_error():
    whole = lineage_of(ROWS)
    assert (len(whole.source), whole.is_parent.sum()) == (5, 2)
    # A track of a longer movie, and one that is not annotated.
    longer = lineage_of([[1, 0, 9, 0], *ROWS[1:], [5, 0, 1, 0], [6, 2, 2, 5]])
    assert (len(longer.source), longer.is_parent.sum()) == (5, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no track has the object 1 of timepoint 0"),
        (ROWS[:3], "no track has the object 4 of timepoint 2"),
        ([[1, 0, 1, 0], *ROWS[1:]], "no track has the object 1 of timepoint 2"),
        ([[1, 1, 2, 0], *ROWS[1:]], "no track has the object 1 of timepoint 0"),
        ([*ROWS, ROWS[0]], "track 1 is listed 2 times"),
        ([*ROWS[:3], [4, 2, 2, 9]], "has the parent 9, which is no track"),
        ([*ROWS[:3], [4, 2, 2, 4]], "its parent 4 at 2; expected an earlier one"),
    ],
)
def test_tracks_that_do_not_fit_the_labels_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        lineage_of(rows)

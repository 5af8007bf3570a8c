"""Words of doubt: what a run should not be believed for, from sums that it has anyway.

Nothing is read for them. Each is a pure function of what is known of one volume; one that holds
for many volumes is told once. docs/doubts.md has how often each is wrong.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.blending import sigmoid
from megaseg_dask.algorithms.doubts import OUTLIER_Z, SPECK_VOXELS, z_of_counts, z_of_shares
from megaseg_dask.events import Doubt
from megaseg_dask.messages import count
from megaseg_dask.run.state import ChannelStatistics, OutputState

# Volumes that are named; all are counted.
_MAX_NAMED = 10

# One object has more than this share of the foreground, and is so many times as large as the
# others are on the median. Where they have less than their share, it is a network or a sheet.
_LARGEST_SHARE = 0.5
_TIMES_LARGER = 16
_OTHERS_SHARE = 0.1
# So many specks, and most of all objects. Where they have more than this share of the foreground,
# the structure itself is small.
_MIN_SPECKS = 20
_SPECKS_SHARE = 0.05
# So many objects near the least size, and most of all objects.
_MIN_NEAR = 20
# Scores at which an automatic threshold is far from 0.5.
_THRESHOLDS = (0.05, 0.95)
# Scores with less than this share of their variance between two classes.
_BIMODALITY = 0.87
_FOREGROUND = 0.6
# Less than this share is next to nothing.
_LEAST_FOREGROUND = 1e-6
# The foreground is brighter than the rest by less than so many standard deviations.
_CONTRAST = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known of one output of one volume at the end of a run."""

    name: str
    n_voxels: int
    # The first channel, and whether its statistics are those of just these voxels.
    channel: ChannelStatistics | None
    is_measured: bool
    output: OutputState
    min_size: int
    is_split: bool
    # Whether the size of the voxels is known, in which objects are taken apart.
    has_size: bool = True

    @property
    def foreground(self) -> float | None:
        """The share of the voxels that are foreground."""
        sizes = self.output.sizes
        return sizes.foreground / self.n_voxels if sizes else None

    @property
    def n_large(self) -> int | None:
        """How many objects are no specks."""
        sizes = self.output.sizes
        n_objects = self.output.n_objects
        return None if sizes is None or n_objects is None else n_objects - sizes.n_specks


@dataclass(frozen=True, slots=True)
class _Reason:
    """What is doubtful about one volume, and what to try."""

    about: str
    text: str
    advice: str
    option: str = ""


def find_doubts(volumes: Sequence[Facts]) -> list[Doubt]:
    """Return the doubts about some volumes, one of each kind."""
    found: dict[str, list[tuple[Facts, _Reason]]] = defaultdict(list)
    for facts in volumes:
        for reason in filter(None, (rule(facts) for rule in _RULES)):
            found[reason.about].append((facts, reason))
    for facts, reason in _find_outliers(volumes):
        found[reason.about].append((facts, reason))
    return [_told_once(reasons, is_alone=len(volumes) == 1) for reasons in found.values()]


def _told_once(reasons: Sequence[tuple[Facts, _Reason]], *, is_alone: bool) -> Doubt:
    first, reason = reasons[0]
    names = list(dict.fromkeys(facts.name for facts, _ in reasons))
    text = reason.text if is_alone else f"{first.name}: {reason.text}"
    if len(names) > 1:
        text += f" (and {len(names) - 1} more of such volumes)"
    return Doubt(reason.about, text, reason.advice, names[:_MAX_NAMED], len(names), reason.option)


# -- one volume


def _constant(facts: Facts) -> _Reason | None:
    if facts.channel is None or not facts.channel.is_constant:
        return None
    return _Reason(
        "constant",
        "all voxels have one value, so its objects mean nothing",
        "look at the image: is it empty, or is --channel another one?",
    )


def _one_object(facts: Facts) -> _Reason | None:
    sizes = facts.output.sizes
    if sizes is None or sizes.largest <= _LARGEST_SHARE * sizes.foreground:
        return None
    is_network = sizes.others < _OTHERS_SHARE * sizes.foreground
    if is_network or sizes.largest < _TIMES_LARGER * sizes.typical:
        return None
    advice = "if it should be several, --split distance splits it"
    option = "--split distance"
    if facts.is_split:
        advice = "if it should be several, try a smaller --split-depth or a higher --threshold"
        option = ""
    elif not facts.has_size:
        advice = "if it should be several, try a higher --threshold"
        option = ""
    share = sizes.largest / sizes.foreground
    times = sizes.largest / sizes.typical
    text = (
        f"one object holds {share:.0%} of the foreground, and is {times:.0f} times as large as "
        "most others"
    )
    return _Reason("one object", text, advice, option)


def _specks(facts: Facts) -> _Reason | None:
    sizes = facts.output.sizes
    n_objects = facts.output.n_objects
    if sizes is None or not n_objects:
        return None
    if sizes.n_specks < _MIN_SPECKS or 2 * sizes.n_specks <= n_objects:
        return None
    share = sizes.in_specks / sizes.foreground
    if share >= _SPECKS_SHARE:
        return None
    return _Reason(
        "specks",
        f"{sizes.n_specks} of {n_objects} objects have fewer than {SPECK_VOXELS} voxels, and hold "
        f"{share:.1%} of the foreground",
        f"--min-size {SPECK_VOXELS} or more removes them",
        f"--min-size {SPECK_VOXELS}",
    )


def _small_objects(facts: Facts) -> _Reason | None:
    sizes = facts.output.sizes
    n_objects = facts.output.n_objects
    if sizes is None or not n_objects or not facts.min_size:
        return None
    if sizes.n_near < _MIN_NEAR or 2 * sizes.n_near <= n_objects:
        return None
    return _Reason(
        "small objects",
        f"{sizes.n_near} of {n_objects} objects have less than twice the least size, "
        f"{facts.min_size} voxels",
        "look at some of them: if they are specks, --min-size should be larger; if they are real, "
        "smaller",
    )


def _threshold(facts: Facts) -> _Reason | None:
    logit = facts.output.threshold
    if logit is None:
        return None
    score = float(sigmoid(np.array([logit], np.float32))[0])
    lowest, highest = _THRESHOLDS
    if lowest <= score <= highest:
        return None
    return _Reason(
        "threshold",
        f"the threshold that was found is a score of {score:.2g}, far from 0.5",
        "compare with --threshold 0.5, which the authors of MegaSeg validated",
        "--threshold 0.5",
    )


def _no_classes(facts: Facts) -> _Reason | None:
    share = facts.output.bimodality
    if share is None or share >= _BIMODALITY:
        return None
    return _Reason(
        "no classes",
        "the scores do not form two classes, so no threshold separates them",
        "look at the scores: is there a structure at all? Compare with --threshold 0.5",
        "--threshold 0.5",
    )


def _too_much(facts: Facts) -> _Reason | None:
    share = facts.foreground
    if share is None or share <= _FOREGROUND:
        return None
    return _Reason(
        "foreground",
        f"{share:.0%} of all voxels are foreground",
        "try a higher --threshold, and look whether the model knows this structure",
    )


def _noise(facts: Facts) -> _Reason | None:
    n_above = facts.output.n_above
    total = facts.output.sum_above
    channel = facts.channel
    is_known = facts.is_measured and channel is not None and channel.std > 0
    if not n_above or total is None or channel is None or not is_known:
        return None
    n_below = facts.n_voxels - n_above
    if n_below <= 0:
        return None
    above = total / n_above
    below = (channel.mean * facts.n_voxels - total) / n_below
    contrast = (above - below) / channel.std
    if contrast >= _CONTRAST:
        return None
    return _Reason(
        "noise",
        f"the foreground is brighter than the rest by only {contrast:.2g} standard deviations, as "
        "in an image of noise",
        "look at the image: is it empty, or is --channel another one? If structures are dark, "
        "this is normal",
    )


_RULES: tuple[Callable[[Facts], _Reason | None], ...] = (
    _constant,
    _one_object,
    _specks,
    _small_objects,
    _threshold,
    _no_classes,
    _too_much,
    _noise,
)


# -- many volumes


def _find_outliers(volumes: Sequence[Facts]) -> list[tuple[Facts, _Reason]]:
    """Return the volumes that are far from the others, in objects or in foreground.

    Specks are left out: their number says little.
    """
    counts = {facts: facts.n_large for facts in volumes}
    shares = {facts: facts.foreground for facts in volumes}
    found = []
    for facts, is_high in _far(counts, z_of_counts):
        much = "far more" if is_high else "far fewer"
        objects = count(counts[facts] or 0, "object")
        text = f"{objects} of {SPECK_VOXELS} voxels or more, {much} than elsewhere"
        found.append((facts, text))
    for facts, is_high in _far(shares, lambda known: z_of_shares(known.clip(_LEAST_FOREGROUND))):
        much = "far more" if is_high else "far less"
        found.append((facts, f"{shares[facts]:.1%} of foreground, {much} than elsewhere"))
    advice = "megaseg report shows it beside the others: is it out of focus, empty or damaged?"
    return [(facts, _Reason("outlier", text, advice)) for facts, text in found]


def _far(
    values: Mapping[Facts, float | None],
    z_of: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> list[tuple[Facts, bool]]:
    """Return the volumes whose value is far from the others, and whether it is above them."""
    known = [facts for facts, value in values.items() if value is not None]
    distances = z_of(np.array([values[facts] for facts in known], float))
    pairs = zip(known, distances, strict=True)
    return [(facts, bool(z > 0)) for facts, z in pairs if abs(z) > OUTLIER_Z]

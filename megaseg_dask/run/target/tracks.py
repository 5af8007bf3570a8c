"""The tracks of a target: ``<TARGET>.tracks/`` holds one graph for each label image."""

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.ngff.tracks import SUFFIX, remove_own_tracks
from megaseg_dask.plan.plan import Plan
from megaseg_dask.run.target.arrays import Group, Target
from megaseg_dask.stores import Location


def tracks_of(plan: Plan, group: Group) -> Location:
    """Return where the tracks of a label image are: it is named, of a plate after its field."""
    place = group.image.path_below(plan.target)
    return tracks_at(plan.target, place, group.name)


def tracks_at(target: Location, field: str, label: str) -> Location:
    """Return where the tracks of a label image are: of a field ``A/1/0``, or of an image ``""``."""
    name = "_".join([*field.split("/"), label]) if field else label
    return _folder(target) / f"{name}{SUFFIX}"


def remove_tracks(target: Target) -> None:
    """Remove the tracks of label images that this run makes again."""
    made = set(_folder(target.plan.target).children())
    if not made:
        return
    places = [tracks_of(target.plan, group) for group in target.iter_labels()]
    map_threaded(remove_own_tracks, [place for place in places if place.basename in made])


def _folder(target: Location) -> Location:
    return target.sibling(".tracks")

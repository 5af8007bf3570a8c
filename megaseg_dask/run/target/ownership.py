"""What a run may write at its target: arrays of other runs and of other programs are in the way.

Nothing is ever replaced but what the same run, or an earlier one of the same
name, wrote there. Labels that were made again of scores go with these scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megaseg_dask.concurrency import map_threaded
from megaseg_dask.errors import TargetError
from megaseg_dask.ngff.group import PROVENANCE, find_attributes, is_damaged, require_version
from megaseg_dask.ngff.image import Image
from megaseg_dask.plan.command_line import command_line
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.relabelling import RESULT, can_relabel, outputs_again
from megaseg_dask.plan.settings import option_text
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.target.arrays import ImageTarget, Target, folders
from megaseg_dask.run.target.provenance import is_of_run, provenance_at
from megaseg_dask.run.target.publish import refresh_consolidated
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location

# Of a plate's thousands of fields, only the marks of some are read before a run goes on.
_MAX_MARKS = 16
# Options in which the parts of a plate may differ.
_PER_PART = ("source", "block", "time", "channel", "digest of regions", "mask")


def remove_replaced(plans: Sequence[Plan]) -> None:
    """Remove the records of other runs on the fields that these plans make again."""
    replaced: set[str] = set()
    for plan in plans:
        replaced |= Target(plan).paths
    staying = {plan.run for plan in plans}
    name = plans[0].resolved.label_name
    for earlier in RunFolder.plans(plans[0].target, name, skip_damaged=True):
        shares_fields = not replaced.isdisjoint(Target(earlier).paths)
        if earlier.run not in staying and shares_fields:
            RunFolder(earlier.run).remove()


def find_relabelled(plans: Sequence[Plan]) -> list[Plan]:
    """Return the recorded runs that labelled again what these plans predict anew."""
    first = plans[0]
    if first.adds_labels:
        return []
    written = {path for plan in plans for path in Target(plan).paths}
    recorded = RunFolder.plans(first.target, skip_damaged=True)
    again = [plan for plan in recorded if not plan.resolved.predicts()]
    return [plan for plan in again if not written.isdisjoint(Target(plan).paths)]


def remove_relabelled(relabelled: Plan, plans: Sequence[Plan]) -> None:
    """Remove labels whose scores these plans replace, their tables, and last their record."""
    written = {path for plan in plans for path in Target(plan).paths}
    images = [image for image in Target(relabelled).images if image.path in written]
    are_own = map_threaded(lambda image: _is_own_or_gone(relabelled, image), images)
    own = [image.path for image, is_own in zip(images, are_own, strict=True) if is_own]
    target = Target(relabelled, own)
    if relabelled.resolved.measures_objects():
        # It imports pyarrow.
        from megaseg_dask.run.target.tables import remove_tables

        remove_tables(target)
    target.clear()
    refresh_consolidated(target)
    RunFolder(relabelled.run).remove()


def _is_own_or_gone(plan: Plan, image: ImageTarget) -> bool:
    """Return whether a run made all label images that are there under its names."""
    places = [group.location for group in image.groups if group.location.exists()]
    return all(is_of_run(plan, _undamaged_mark(place)) for place in places)


def find_superseded(plans: Sequence[Plan], recorded: Sequence[Plan]) -> list[Plan]:
    """Return the recorded runs of other names that these plans take the place of.

    The labels of a source may have many names. Elsewhere an image has the scores of one run, and
    the fields of a plate have one name.
    """
    first = plans[0]
    if first.is_in_place:
        return []
    others = [plan for plan in recorded if not plan.adds_labels]
    return [plan for plan in others if plan.resolved.label_name != first.resolved.label_name]


def require_whole(plans: Sequence[Plan], superseded: Sequence[Plan]) -> None:
    """Check that a person agreed to replace the scores of runs of other names, and all of them.

    Raises:
        TargetError: The target holds such a run.
    """
    written = {path for plan in plans for path in Target(plan).paths}
    for other in superseded:
        if not is_present(Target(other)):
            continue
        name = other.resolved.label_name
        holds = (
            f"{other.target} holds outputs of --label-name {name}, and a target has the scores "
            "of only one label name"
        )
        if not plans[0].settings.overwrite:
            raise TargetError(
                f"{holds}; choose another target, or replace them with --overwrite, which leaves "
                f"the labels {name} as they are, without their record"
            )
        kept = sorted(Target(other).paths - written)
        if kept:
            raise TargetError(
                f"{holds}; use --overwrite with all of its fields ({kept[0]} is not chosen), or "
                "choose another target"
            )


def require_alike(plan: Plan, other: Plan) -> None:
    """Check that a part of a plate is made in the same way as a part that is there already.

    Raises:
        TargetError: It is made from another source, or with other options.
    """
    if plan.source != other.source:
        raise TargetError(
            f"{plan.target} has fields of {other.source}; choose another target for the fields of "
            f"{plan.source}"
        )
    changes = _changes(other, plan, _PER_PART)
    if not changes:
        return
    if plan.settings.overwrite:
        advice = (
            "--overwrite all of them (without --wells, --fields and --acquisition), "
            f"or choose {_elsewhere(plan)}"
        )
    else:
        advice = (
            f"use the same options to add fields, choose {_elsewhere(plan)}, or replace them with "
            "--overwrite"
        )
    raise TargetError(
        f"{plan.target} already holds fields computed with different options "
        f"({'; '.join(changes)}); {advice}"
    )


def require_same(plan: Plan, recorded: Plan) -> None:
    """Check that a recorded run would give the same output.

    Raises:
        TargetError: It would not; the message lists the differences.
    """
    if plan.fingerprint != recorded.fingerprint:
        changes = "; ".join(_changes(recorded, plan))
        advice = "use its options to resume it, "
        if plan.resolved.options() == recorded.resolved.options():
            advice = ""
        raise TargetError(
            f"{plan.target} belongs to another run ({changes}); {advice}"
            f"choose {_elsewhere(plan)}, or start again with --overwrite"
            f"{_relabelling(plan, recorded)}"
        )
    if plan.source != recorded.source and plan.source_sample != recorded.source_sample:
        raise TargetError(
            f"{plan.target} belongs to a run on {recorded.source}, and {plan.source} is another "
            f"image; choose {_elsewhere(plan)}, or start again with --overwrite"
        )


def require_grown(plan: Plan, recorded: Plan) -> None:
    """Check that a run that follows its source may go on with a new plan of it.

    Only timepoints and fields may have been added.

    Raises:
        TargetError: Something else differs; the message lists the differences.
    """
    changes = _changes(recorded, plan, ("source", "time"))
    before = recorded.source_image.with_times(0, 1)
    now = plan.source_image.with_times(0, 1)
    is_of_one_form = _form_of(before) == _form_of(now)
    if changes:
        raise TargetError(
            f"{plan.target} belongs to another run ({'; '.join(changes)}); use its options to "
            f"resume it, choose {_elsewhere(plan)}, or start again with --overwrite"
        )
    is_elsewhere = plan.source != recorded.source and plan.source_sample != recorded.source_sample
    if not is_of_one_form or is_elsewhere:
        raise TargetError(
            f"{plan.source} has other changes than new timepoints and fields since {plan.target} "
            f"was started ({_change_of_source(recorded, plan)}); choose {_elsewhere(plan)}, or "
            "start again with --overwrite"
        )


def _form_of(image: Image) -> Image:
    """Return what must stay the same of an image whose timepoints become more."""
    levels = tuple(replace(level, translation=()) for level in image.levels)
    return replace(image, name="", levels=levels, channel_names=(), translation=())


def _relabelling(plan: Plan, recorded: Plan) -> str:
    """Return a command that does without the network, if one would do."""
    if Journal.read(recorded).result is None:
        # Labels of a part of the scores are not what is asked for.
        return ""
    if not can_relabel(recorded, plan):
        return ""
    options = plan.resolved.options()
    before = recorded.resolved.options()
    names = [name for name in RESULT if options[name] != before[name]]
    outputs = outputs_again(plan.resolved)
    given = set(names) - {"outputs"}
    if outputs != ("labels",):
        # Labels alone, if none are given.
        given.add("outputs")
    settings = plan.resolved.as_settings(plan.settings).model_copy(update={"outputs": outputs})
    command = command_line(
        "relabel",
        plan.target,
        "--label-name",
        "NEW",
        settings=settings,
        options=given,
        repeats_defaults=True,
    )
    differing = " and ".join(map(option_text, names))
    verb = "differs" if len(names) == 1 else "differ"
    return f"; only {differing} {verb}, so no new prediction is needed: {command}"


def _elsewhere(plan: Plan) -> str:
    # The labels of a source have no other place, but may have another name.
    return "another --label-name" if Target(plan).is_in_place else "another target"


def _changes(old: Plan, new: Plan, ignored: Sequence[str] = ()) -> list[str]:
    """Return how what determines the output of a plan differs from that of an earlier one."""
    before = old.determinants
    changes = []
    for name, value in new.determinants.items():
        if name in ignored or before.get(name) == value:
            continue
        match name:
            case "source":
                changes.append(_change_of_source(old, new))
            case "model":
                changes.append(_change_of_model(old, new))
            case _:
                changes.append(f"{name}: was {_short(before.get(name))}, now {_short(value)}")
    return changes


def _change_of_source(old: Plan, new: Plan) -> str:
    """Return what differs in the metadata of two sources, of which the digests differ."""
    if old.images.keys() != new.images.keys():
        return f"source: had {len(old.images)} fields, has {len(new.images)} others or more"
    before = old.source_image
    now = new.source_image
    found = {
        "shape": (before.levels[0].shape, now.levels[0].shape),
        "dtype": (before.dtype, now.dtype),
        "axes": (before.axis_names, now.axis_names),
        "channels": (before.channels, now.channels),
        "levels": (len(before.levels), len(now.levels)),
        "voxel size": (before.spacing_um, now.spacing_um),
    }
    differing = [
        f"{name} was {_short(was)} and is {_short(value)}"
        for name, (was, value) in found.items()
        if was != value
    ]
    return f"source: {', '.join(differing) or 'its metadata or chunks are others than then'}"


def _change_of_model(old: Plan, new: Plan) -> str:
    if old.model.name != new.model.name:
        return f"model: was {old.model.name}, now {new.model.name}"
    return f"model: {new.model.name} has other weights or settings than then"


def _short(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def is_present(target: Target) -> bool:
    """Return whether the arrays of a recorded run still exist.

    A missing array would read as background.
    """
    if target.plan.grows:
        # Others may have been planned and not yet made.
        target = Target(target.plan, [target.plan.volumes[0].image])
    arrays = [group.location / "0" for group in target.iter_groups()]
    if not all(map_threaded(Location.exists, arrays)):
        return False
    # A mark that is lost or damaged is written again; none is there if nothing is ours.
    known = _known_marks(target)
    return bool(known) and all(is_of_run(target.plan, mark) for mark in known)


def is_marked(target: Target) -> bool:
    """Return whether a group of our own target still says that a run of megaseg made it."""
    return not target.is_in_place and bool(_known_marks(target))


def _known_marks(target: Target) -> list[Mapping[str, object]]:
    marks = [_undamaged_mark(group) for group in target.marked[:_MAX_MARKS]]
    return [mark for mark in marks if mark is not None]


def _undamaged_mark(group: Location) -> Mapping[str, object] | None:
    try:
        return provenance_at(group)
    except TargetError:
        return None


def require_free(target: Target, *, is_recorded: bool, is_joining: bool = False) -> None:
    """Check that nothing of another run or program is where the run would write.

    A run that ``is_recorded`` may find its own arrays there. One that ``is_joining`` others adds
    fields to their plate.

    Raises:
        TargetError: Something is in the way.
    """
    locations = [target.location]
    if target.is_in_place or is_joining:
        locations = [group.location for group in target.iter_groups()]
    map_threaded(lambda where: _require_free(target, where, is_recorded=is_recorded), locations)
    if target.is_in_place and target.plan.settings.overwrite:
        # The list of labels is not ours alone. It must be readable before any of them goes.
        map_threaded(lambda image: find_attributes(image.labels), target.images)
    map_threaded(lambda image: _require_one_version(target, image), target.images)


def _require_free(target: Target, where: Location, *, is_recorded: bool) -> None:
    if not where.exists():
        return
    if not where.is_folder():
        raise TargetError(f"{where} is a file; choose another target")
    names = where.children()
    if not names:
        return
    # Nothing was here when the run was recorded. What it had begun, it writes again.
    if is_recorded and is_damaged(where, names):
        return
    if _is_foreign(where, names):
        raise TargetError(
            f"{where} holds Zarr data that megaseg did not write and never replaces; choose "
            "another target"
        )
    # A person who agreed to --overwrite once, and was interrupted, need not agree again.
    if target.plan.settings.overwrite or (is_recorded and _is_ours(target, where)):
        return
    raise TargetError(
        f"{where} exists, but no run of megaseg is recorded there; choose "
        f"{_elsewhere(target.plan)}, or pass --overwrite"
    )


def _is_ours(target: Target, where: Location) -> bool:
    """Return whether a recorded run made a group, or may have been about to."""
    # The root of a plate belongs to all its runs.
    if target.is_whole_plate and where == target.location:
        return True
    provenance = provenance_at(where)
    return provenance is None or is_of_run(target.plan, provenance)


def _is_foreign(location: Location, names: Sequence[str]) -> bool:
    """Return whether a folder has data that a run would replace, without a mark or provenance."""
    has_arrays = any(map(str.isdigit, names))
    if not has_arrays and not {"zarr.json", ".zgroup", ".zarray"}.intersection(names):
        return False
    attributes = find_attributes(location)
    if attributes is None:
        return True
    # A bare group may be one whose mark was not yet written when its run was killed.
    return PROVENANCE not in attributes and (has_arrays or bool(attributes))


def _require_one_version(target: Target, image: ImageTarget) -> None:
    """Require that all that stays at an image is stored in the Zarr format of the run."""
    others = folders(image.labels) - {group.name for group in image.label_groups}
    if others:
        require_version(image.labels, target.version)
    if image.tables and image.other_tables():
        require_version(image.tables_group, target.version)
    if "scores" not in target.plan.arrays:
        require_version(image.location, target.version)

"""Groups of volumes that share a normalization: they are whole, and of one plan, or refused."""

from collections.abc import Sequence
from dataclasses import replace

from megaseg_dask.errors import SettingsError, SourceError
from megaseg_dask.plan.plan import group_of_field
from megaseg_dask.plan.plate_parts import Part, Readable
from megaseg_dask.plan.resolved import OfGroup, normalization_of
from megaseg_dask.plan.settings import Settings


def require_whole_groups(
    parts: Sequence[Part], settings: Settings
) -> tuple[list[Part], dict[str, SettingsError | SourceError]]:
    """Return parts without the fields whose group lacks one, and why each of these is refused.

    Raises:
        SettingsError: There is no plate, or fields of one group have several forms.
    """
    normalization = normalization_of(settings)
    if not isinstance(normalization, OfGroup):
        return list(parts), {}
    if parts[0].plate is None and normalization.kind != "series":
        raise SettingsError(
            f"--normalization {normalization.kind}: the source is not a plate; use series, or "
            "omit the option"
        )
    _require_one_form(parts, normalization)
    whole = []
    refused: dict[str, SettingsError | SourceError] = {}
    for part in parts:
        reasons = _reasons(part, normalization)
        refused |= reasons
        kept = {path: field for path, field in part.fields.items() if path not in reasons}
        if kept:
            whole.append(_with_fields(part, kept))
    return whole, refused


def _require_one_form(parts: Sequence[Part], normalization: OfGroup) -> None:
    # The part of each group, by the folder of its run, and its first field.
    seen: dict[str, tuple[str, str]] = {}
    members = [(str(part.run), part.plate, path) for part in parts for path in part.fields]
    for other in parts[0].others:
        members += [(str(other.run), other.plate, path) for path in other.images]
    for run, plate, path in members:
        group = group_of_field(normalization, plate, path)
        first_run, first = seen.setdefault(group, (run, path))
        if first_run != run:
            raise SettingsError(
                f"--normalization {normalization.kind}: fields {first} and {path} of one group "
                "have different shapes, or different commands chose them; segment each into its "
                "own target (--wells, --fields)"
            )


def _reasons(part: Part, normalization: OfGroup) -> dict[str, SettingsError | SourceError]:
    """Return why fields are refused: their group has a field that cannot be read."""
    if part.plate is None or part.recorded is not None:
        return {}
    reasons: dict[str, SettingsError | SourceError] = {}
    for path in part.fields:
        lacking = [lost for lost, _ in part.plate.missing if _shares(path, lost, normalization)]
        if lacking:
            reasons[path] = SourceError(
                f"{path}: the statistics of its {normalization.kind} need {lacking[0]}, which "
                "cannot be read"
            )
    return reasons


def _shares(path: str, lost: str, normalization: OfGroup) -> bool:
    """Return whether a field is in the group of a well or a field that cannot be read."""
    match normalization.kind:
        case "series":
            return False
        case "well":
            return path.split("/")[:2] == lost.split("/")[:2]
    # Nobody knows the acquisition of what cannot be read.
    return True


def _with_fields(part: Part, fields: dict[str, Readable]) -> Part:
    plate = part.plate
    if plate is not None:
        kept = tuple(field for field in plate.fields if field.path in fields)
        plate = replace(plate, fields=kept)
    return replace(part, fields=fields, plate=plate)

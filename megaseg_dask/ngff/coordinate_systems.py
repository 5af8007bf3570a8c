"""Images of OME-Zarr 0.6, reduced to the scales and translations of 0.5.

All levels lead into one coordinate system, which the specification calls intrinsic: it "should be
used for viewing and processing unless a use case dictates otherwise". So its axes are the axes of
the image. Transformations from it into other systems are not read, whatever they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megaseg_dask.errors import SourceError
from megaseg_dask.stores import Location

Json = Mapping[str, Any]

_SYSTEMS = "coordinateSystems"
_TRANSFORMS = "coordinateTransformations"
_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def is_version_06(ome: Json, entry: Json) -> bool:
    """Return whether a multiscale is of OME-Zarr 0.6, as it states or as its form says."""
    stated = ome.get("version") or entry.get("version")
    return str(stated).startswith("0.6") if stated else _SYSTEMS in entry


def in_version_05(location: Location, ome: Json) -> Json:
    """Return the OME metadata of a group, those of an image of OME-Zarr 0.6 as metadata of 0.5.

    Raises:
        SourceError: As :func:`without_coordinate_systems`.
    """
    match ome:
        case {"multiscales": [{} as entry, *_]} if is_version_06(ome, entry):
            reduced = without_coordinate_systems(location, entry)
            return {**ome, "version": "0.5", "multiscales": [reduced]}
    return ome


def without_coordinate_systems(location: Location, entry: Json) -> dict[str, Any]:
    """Return a multiscale of OME-Zarr 0.6 in the form of 0.5.

    Its axes are objects with names. Transformations of levels are scales and translations, and not
    checked otherwise.

    Raises:
        SourceError: A level has another transformation, which is named; or the levels do not lead
            into one coordinate system with axes.
    """
    datasets = entry.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise _invalid(location, "multiscales.datasets lists no levels")
    names = {_output_of(dataset) for dataset in datasets}
    if len(names) > 1:
        shown = ", ".join(sorted(map(str, names)))
        raise _invalid(location, f"its levels lead into several coordinate systems ({shown})")
    (name,) = names
    plain = [_with_plain_transforms(location, dataset) for dataset in datasets]
    reduced = {key: value for key, value in entry.items() if key not in (_SYSTEMS, _TRANSFORMS)}
    return {**reduced, "axes": _axes_of(location, entry, name), "datasets": plain}


def _axes_of(location: Location, entry: Json, name: str | None) -> list[Json]:
    """Return the axes of a coordinate system, with the types that their names mean."""
    systems = entry.get(_SYSTEMS)
    for system in systems if isinstance(systems, list) else ():
        match system:
            case {"name": str(found), "axes": [*axes]} if found == name:
                if not all(isinstance(a, dict) and isinstance(a.get("name"), str) for a in axes):
                    raise _invalid(location, f"an axis of {found!r} has no name")
                types = [_TYPES.get(axis["name"].lower()) for axis in axes]
                typed = zip(types, axes, strict=True)
                return [{"type": kind, **axis} if kind else axis for kind, axis in typed]
    raise _invalid(location, f"{_SYSTEMS} have no axes of the system that the levels lead into")


def _invalid(location: Location, problem: str) -> SourceError:
    return SourceError(
        f"{location}: its OME-Zarr 0.6 metadata are invalid: {problem}; correct them"
    )


def _output_of(dataset: Any) -> Any:
    """Return the name of the system that a level leads into."""
    match dataset:
        case {"coordinateTransformations": [{"output": {"name": str(name)} | str(name)}, *_]}:
            return name
    return None


def _with_plain_transforms(location: Location, dataset: Any) -> Any:
    match dataset:
        case {"coordinateTransformations": [{} as transform]}:
            subject = f"{location}: level {dataset.get('path')!r}"
            return {**dataset, _TRANSFORMS: _plain(list(_iter_parts(subject, transform)))}
        case {"coordinateTransformations": [_, _, *_] as transforms}:
            raise _invalid(
                location,
                f"level {dataset.get('path')!r} has {len(transforms)} transformations, and not one",
            )
    return dataset


def _iter_parts(subject: str, transform: Json) -> Iterator[Json]:
    """Yield the scales and translations that a transformation is made of, first applied first.

    Raises:
        SourceError: It has another part.
    """
    match transform:
        case {"type": "sequence", "transformations": [*parts]}:
            for part in parts:
                yield from _iter_parts(subject, part if isinstance(part, dict) else {})
        case {"type": "identity"}:
            pass
        case {"type": "scale" | "translation" as kind} if kind in transform:
            yield {"type": kind, kind: transform[kind]}
        case {"type": "scale" | "translation" as kind}:
            raise SourceError(
                f"{subject} has a {kind} that is no list of numbers in the metadata; write the "
                "numbers there"
            )
        case _:
            raise SourceError(
                f"{subject} has a transformation of type {transform.get('type')!r}; megaseg reads "
                "images on grids of scale and translation: resample it onto one"
            )


def _plain(parts: Sequence[Json]) -> list[Json]:
    """Return one scale and one translation; what is of no known form stays, to be told later."""
    if [part["type"] for part in parts] in ([], ["scale"], ["scale", "translation"]):
        # No transformation at all is an identity.
        return [*parts] or [{"type": "identity"}]
    try:
        values = np.array([part[part["type"]] for part in parts], np.float64)
    except (TypeError, ValueError):
        return [*parts]
    if values.ndim != 2:
        return [*parts]
    scale = np.ones(values.shape[1])
    translation = np.zeros(values.shape[1])
    for part, numbers in zip(parts, values, strict=True):
        if part["type"] == "scale":
            scale *= numbers
            translation *= numbers
        else:
            translation += numbers
    return [
        {"type": "scale", "scale": scale.tolist()},
        {"type": "translation", "translation": translation.tolist()},
    ]

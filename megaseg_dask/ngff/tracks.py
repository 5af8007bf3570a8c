"""Tracks as GEFF, the graph format that napari, ultrack and TrackMate read: objects and links.

The package ``geff`` writes and checks it in a local folder; then it is put at its place, its
attributes last, so that no reader takes a part for the whole.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.errors import SettingsError, SourceError, TargetError
from megaseg_dask.messages import install_command, one_line
from megaseg_dask.ngff.group import PROVENANCE, find_attributes
from megaseg_dask.ngff.image import SPATIAL
from megaseg_dask.ngff.versions import VERSIONS
from megaseg_dask.stores import Location, naming

Columns = Mapping[str, NDArray[Any]]

SUFFIX = ".geff"

# GEFF's names for what tells tracks and lineages apart.
_TRACK_PROPERTIES = {"tracklet": "track_id", "lineage": "lineage_id"}
_LABEL_PROPERTY = "label"


@dataclass(frozen=True, slots=True, eq=False)
class TrackGraph:
    """Objects and the links between them.

    ``nodes`` are columns ``(n,)``: ``t``, ``z``, ``y``, ``x`` (in ``unit``, empty for voxels),
    ``label``, ``track_id``, ``lineage_id`` and others. ``links`` are positions of two of them,
    ``(m, 2)``, the earlier one first; ``link_columns`` are ``(m,)``.
    """

    nodes: Columns
    links: NDArray[Any]
    link_columns: Columns
    unit: str


def require_geff() -> None:
    """Check that the package ``geff`` is installed.

    Raises:
        SettingsError: It is not; the message has the command that installs it.
    """
    if find_spec("geff") is None:
        raise SettingsError(f"tracks need the package geff: {install_command('tracks')}")


def require_own_tracks(location: Location) -> None:
    """Check that no tracks are at a location that another program wrote.

    Raises:
        TargetError: There are.
    """
    attributes = find_attributes(location)
    if attributes and not _is_own(attributes):
        raise TargetError(
            f"{location} holds tracks that megaseg did not write and never replaces; move them away"
        )


def remove_own_tracks(location: Location) -> None:
    """Remove tracks that this package wrote."""
    if _is_own(find_attributes(location) or {}):
        _remove(location)


def write_tracks(
    location: Location, graph: TrackGraph, *, labels_path: str, provenance: Mapping[str, object]
) -> None:
    """Write tracks as GEFF, in place of those that are there.

    ``labels_path`` is where the label image is, relative to ``location``.

    Raises:
        TargetError: Tracks are there that another program wrote.
        StoreError: The store failed.
    """
    require_own_tracks(location)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "tracks"
        with naming(Location.of(folder), "write"):
            _write_here(local, graph, labels_path, provenance)
        _remove(location)
        files = sorted(path for path in local.rglob("*") if path.is_file())
        described = {version.attributes_file for version in VERSIONS.values()}
        last = [path for path in files if path.parent == local and path.name in described]
        for path in [*(path for path in files if path not in last), *last]:
            location.put(path.relative_to(local).as_posix(), path.read_bytes())


def read_tracks(location: Location) -> TrackGraph:
    """Read tracks of any program that writes GEFF, with the properties ``t`` and ``label``.

    ``seg_id`` and what the metadata name are other names of ``label``.

    Raises:
        SourceError: There are no such tracks.
        StoreError: The store failed.
    """
    from geff.core_io import read_to_memory

    keys = location.keys("")
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "tracks"
        for key in keys:
            data = location.get(key)
            if data is not None:
                (local / key).parent.mkdir(parents=True, exist_ok=True)
                (local / key).write_bytes(data)
        try:
            found = read_to_memory(local)
        # The package raises errors of many kinds about what is wrong with a file.
        except Exception as error:
            raise SourceError(f"{location} cannot be read as GEFF: {one_line(error)}") from error
    nodes = {name: known["values"] for name, known in found["node_props"].items()}
    related = found["metadata"].related_objects or ()
    names = [getattr(each, "node_prop", None) or each.label_prop for each in related]
    names = [name for name in (*names, "label", "seg_id") if name in nodes]
    if "t" not in nodes or not names:
        raise SourceError(f"{location} does not tell timepoint and label of its objects (t, label)")
    ids = found["node_ids"]
    order = np.argsort(ids)
    links = order[np.searchsorted(ids, found["edge_ids"], sorter=order)]
    return TrackGraph({**nodes, "label": nodes[names[0]]}, links, {}, "")


def _write_here(
    folder: Path, graph: TrackGraph, labels_path: str, provenance: Mapping[str, object]
) -> None:
    # It takes half a second to import.
    import geff_spec
    from geff.core_io import write_arrays

    axes = [geff_spec.Axis(name="t", type="time", unit="frame")]
    unit = graph.unit or None
    axes += [geff_spec.Axis(name=name, type="space", unit=unit) for name in SPATIAL]
    related = geff_spec.RelatedObject
    # It has another name since version 1.2 of the specification.
    known_as = "node_prop" if "node_prop" in related.model_fields else "label_prop"
    labels = related(type="labels", path=labels_path, **{known_as: _LABEL_PROPERTY})
    metadata = geff_spec.GeffMetadata(
        directed=True,
        axes=axes,
        node_props_metadata={},
        edge_props_metadata={},
        track_node_props=_TRACK_PROPERTIES,
        related_objects=[labels],
        extra={PROVENANCE: dict(provenance)},
    )
    write_arrays(
        str(folder),
        np.arange(len(graph.nodes[_LABEL_PROPERTY]), dtype=np.uint64),
        {name: {"values": values, "missing": None} for name, values in graph.nodes.items()},
        graph.links.astype(np.uint64).reshape(-1, 2),
        {name: {"values": values, "missing": None} for name, values in graph.link_columns.items()},
        metadata,
    )


def _is_own(attributes: Mapping[str, Any]) -> bool:
    match attributes:
        case {"geff": {"extra": {**extra}}}:
            return PROVENANCE in extra
    return False


def _remove(location: Location) -> None:
    # Without its attributes it is no GEFF any more, whatever is left by a kill.
    for version in VERSIONS.values():
        location.delete(version.attributes_file)
    location.remove()

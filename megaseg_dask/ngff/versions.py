"""The versions of OME-Zarr: all that differs between them, a row for each.

Only data, so that the declaration of the options can import it at once.
"""

import importlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

VersionName = Literal["0.4", "0.5"]
LATEST: VersionName = "0.5"

_COMPLETING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Version:
    """One version of OME-Zarr, as it is stored."""

    name: VersionName
    zarr_format: Literal[2, 3]
    # The objects that make a folder a group, hold a group's attributes, and make a folder an array.
    group_file: str
    attributes_file: str
    array_file: str
    # Whether OME metadata lie below the key "ome" of the attributes.
    has_ome_key: bool
    # Whether several chunks can be one object, and arrays have names of axes.
    has_shards: bool
    compressor: Mapping[str, Any]
    # The module of ome-zarr-models that checks its metadata.
    models_module: str

    @property
    def models(self) -> Any:
        """The models of its metadata."""
        with _COMPLETING:
            models = importlib.import_module(self.models_module)
            # Pydantic completes this model at its first use, which is not safe in several threads.
            models.multiscales.Multiscale.model_rebuild()
        return models


_V04 = Version(
    name="0.4",
    zarr_format=2,
    group_file=".zgroup",
    attributes_file=".zattrs",
    array_file=".zarray",
    has_ome_key=False,
    has_shards=False,
    # Readers of Zarr v2 (jzarr, and so Fiji and QuPath) know Blosc, not Zstd.
    compressor={"id": "blosc", "cname": "zstd", "clevel": 1, "shuffle": 1},
    models_module="ome_zarr_models.v04",
)
_V05 = Version(
    name="0.5",
    zarr_format=3,
    group_file="zarr.json",
    attributes_file="zarr.json",
    array_file="zarr.json",
    has_ome_key=True,
    has_shards=True,
    # A checksum tells a damaged chunk from data.
    compressor={"name": "zstd", "configuration": {"level": 1, "checksum": True}},
    models_module="ome_zarr_models.v05",
)

VERSIONS: Mapping[str, Version] = {version.name: version for version in (_V04, _V05)}
# OME-Zarr 0.6 is read and not written: it is stored as this version, and reduced to its form.
NEXT = _V05


def version_of_format(zarr_format: int) -> Version:
    """Return the version that is stored in a Zarr format."""
    return next(v for v in VERSIONS.values() if v.zarr_format == zarr_format)

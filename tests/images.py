"""OME-Zarr images for tests, written with zarr alone: not by the code under test."""

from pathlib import Path

import numpy as np
import zarr

TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def write_image(
    path: Path,
    *levels: np.ndarray,
    axes: str = "zyx",
    version: str = "0.5",
    scale: dict[str, float] | None = None,
    channels: list[str] | None = None,
    **array_options,
) -> Path:
    """Write one array per level; ``array_options`` go to ``zarr.create_array``."""
    v3 = version == "0.5"
    group = zarr.open_group(path, mode="w", zarr_format=3 if v3 else 2)
    datasets = []
    for i, data in enumerate(levels):
        options = {"chunks": tuple(min(n, 32) for n in data.shape), **array_options}
        if v3:
            options.setdefault("dimension_names", list(axes))
        else:
            options.setdefault("chunk_key_encoding", {"name": "v2", "separator": "/"})
        array = group.create_array(str(i), shape=data.shape, dtype=data.dtype, **options)
        array[...] = data
        factors = [first / n for first, n in zip(levels[0].shape, data.shape, strict=True)]
        steps = [(scale or {}).get(a, 1.0) * round(f) for a, f in zip(axes, factors, strict=True)]
        datasets.append({"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": steps}]})
    units = {"z": "micrometer", "y": "micrometer", "x": "micrometer", "t": "second"}
    entry = {
        "name": "image",
        "axes": [{"name": a, "type": TYPES[a], **({"unit": units[a]} if a in units else {})} for a in axes],
        "datasets": datasets,
    }
    ome: dict = {"multiscales": [entry]}
    if channels:
        ome["omero"] = {"channels": [{"label": name} for name in channels]}
    if v3:
        group.attrs["ome"] = {"version": "0.5", **ome}
    else:
        entry["version"] = "0.4"
        group.attrs.update(ome)
    return path


def blobs(shape: tuple[int, ...], seed: int = 0, dtype: str = "uint16") -> np.ndarray:
    """A smooth random image with structure at the scale of a few voxels."""
    from scipy.ndimage import gaussian_filter

    noise = np.random.default_rng(seed).standard_normal(shape)
    smooth = gaussian_filter(noise, 2)
    return (1000 + 400 * smooth / smooth.std()).clip(0).astype(dtype)

"""Zarr at speed: codecs, chunks, codec pipelines, stores and threads, for images and outputs.

One field (65×624×924): the simulated image as uint16, scores as uint8, labels
as uint32. Each case is written and read back whole, three times; the quickest
counts, in megabytes of voxels a second, so that codecs of any ratio compare.
The pipeline of ``zarrs`` is left out where it is not installed.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
import obstore
import zarr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from benchmarks.field import PUBLISHED_SHAPE
from benchmarks.machine import describe, keep
from starter.simulation import simulate

Array = NDArray[Any]

ZSTD = zarr.codecs.ZstdCodec
BLOSC = zarr.codecs.BloscCodec
CODECS: dict[str, Any] = {
    "zstd 1, checksum (ours)": ZSTD(level=1, checksum=True),
    "zstd 1": ZSTD(level=1),
    "zstd 3": ZSTD(level=3),
    "blosc lz4, shuffle": BLOSC(cname="lz4", clevel=5, shuffle="shuffle"),
    "blosc zstd 1, shuffle": BLOSC(cname="zstd", clevel=1, shuffle="shuffle"),
    "blosc zstd 1, bitshuffle": BLOSC(cname="zstd", clevel=1, shuffle="bitshuffle"),
    "none": None,
}
CHUNKS = {
    "65×624×924, one": (65, 624, 924),
    "65×312×308": (65, 312, 308),
    "65×156×154": (65, 156, 154),
    "33×125×116 (ours)": (33, 125, 116),
    "17×63×58": (17, 63, 58),
    "1×624×924, planes": (1, 624, 924),
}
STORES = ("zarr's LocalStore", "obstore")
PIPELINES = {
    "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}
CHUNK = CHUNKS["33×125×116 (ours)"]
SHARD = (66, 375, 464)


def products(shape: tuple[int, ...]) -> dict[str, Array]:
    """Return an image, scores and labels of one simulated field."""
    made = simulate(0, shape)
    scores = np.rint(255 * gaussian_filter(made.mask.astype(np.float32), 1)).astype(np.uint8)
    labels = cc3d.connected_components(made.mask, connectivity=6)
    return {
        "image": made.image.astype(np.uint16),
        "scores": scores,
        "labels": labels.astype(np.uint32),
    }


def measure(shape: tuple[int, ...] = PUBLISHED_SHAPE, repeats: int = 3) -> dict[str, Any]:
    """Return what each case reads and writes, megabytes of voxels a second."""
    machine = describe()
    arrays = products(shape)
    with tempfile.TemporaryDirectory() as name:
        trial = Trial(Path(name), repeats)
        of_codecs = {kind: trial.run_codecs(values) for kind, values in arrays.items()}
        of_chunks = {kind: trial.run_chunks(values) for kind, values in arrays.items()}
        sharded = {kind: trial.run(values, shards=SHARD) for kind, values in arrays.items()}
        pipelines = {}
        for pipeline, store, threads in product(PIPELINES, STORES, (1, 2, 4, 16)):
            # zarrs opens folders itself.
            is_possible = pipeline == "zarr" or store != "obstore"
            if is_possible and importlib.util.find_spec(pipeline):
                case = f"{pipeline}, {store}, {threads} threads"
                pipelines[case] = trial.run(arrays["image"], pipeline, store, threads)
    return {
        "machine": machine,
        "shape": shape,
        "codecs": of_codecs,
        "chunks": of_chunks,
        "shards of 66×375×464 (ours)": sharded,
        "image_by_pipeline": pipelines,
    }


class Trial:
    """Writes and reads arrays in a folder, each in turn."""

    def __init__(self, folder: Path, repeats: int) -> None:
        self.folder = folder
        self.repeats = repeats

    def run_codecs(self, values: Array) -> dict[str, dict[str, float]]:
        """Return the figures of each codec."""
        return {name: self.run(values, compressors=codec) for name, codec in CODECS.items()}

    def run_chunks(self, values: Array) -> dict[str, dict[str, float]]:
        """Return the figures of each chunk shape."""
        return {
            name: self.run(values, chunks=_fit(chunk, values.shape))
            for name, chunk in CHUNKS.items()
        }

    def run(
        self,
        values: Array,
        pipeline: str = "zarr",
        store: str = "zarr's LocalStore",
        threads: int | None = None,
        **how: Any,
    ) -> dict[str, float]:
        """Return megabytes a second written and read, and how many times smaller it became."""
        settings = {"codec_pipeline.path": PIPELINES[pipeline], "threading.max_workers": threads}
        how = {
            "chunks": _fit(CHUNK, values.shape),
            "compressors": CODECS["zstd 1, checksum (ours)"],
            **how,
        }
        path = self.folder / "array.zarr"
        with zarr.config.set(settings):
            where = _store(path, store)
            array = zarr.create_array(
                where, shape=values.shape, dtype=values.dtype, overwrite=True, **how
            )

            def write() -> None:
                array[...] = values

            write_s = self._quickest(write)
            stored = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            reader = zarr.open_array(where, mode="r")
            read_s = self._quickest(lambda: reader[...])
            assert np.array_equal(np.asarray(reader[...]), values)
        return {
            "write_mb_s": round(values.nbytes / write_s / 1e6),
            "read_mb_s": round(values.nbytes / read_s / 1e6),
            "times_smaller": round(values.nbytes / stored, 1),
        }

    def _quickest(self, work: Callable[[], Any]) -> float:
        def passes() -> Iterator[float]:
            for _ in range(self.repeats):
                started = time.perf_counter()
                work()
                yield time.perf_counter() - started

        return min(passes())


def _store(path: Path, kind: str) -> Any:
    if kind == "obstore":
        return zarr.storage.ObjectStore(obstore.store.LocalStore(prefix=path, mkdir=True))
    return zarr.storage.LocalStore(path)


def _fit(extents: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(min, extents, shape))


def main() -> None:
    """Measure, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    keep("io", measure())


if __name__ == "__main__":
    main()

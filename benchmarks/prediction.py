"""The logits of a bundle for an image in memory: the product's engine and blending, no files."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaseg_dask.algorithms.array_library import NUMPY
from megaseg_dask.algorithms.blending import sigmoid
from megaseg_dask.algorithms.geometry import Box, PatchGrid
from megaseg_dask.inference.block import Block, Engine, Patches, blend_patches
from megaseg_dask.inference.engine import EngineSpec, open_apart, open_engine
from megaseg_dask.inference.engine_names import EngineName
from megaseg_dask.inference.ensemble import ModelRef
from megaseg_dask.models import Bundle
from megaseg_dask.models.registry import load


@dataclass(frozen=True)
class Predictor:
    """A bundle on one thread of a CPU, with its own patches."""

    path: str
    bundle: Bundle
    spec: EngineSpec
    engine: Engine

    def logits(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Return the blended logits of an image ``(z, y, x)``, float32."""
        grid = PatchGrid(image.shape, self.bundle.patch_shape, self.bundle.overlap)
        return predict(self.engine, image, grid)

    def scores(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Return the scores of an image ``(z, y, x)``, float32 from 0 to 1."""
        return sigmoid(self.logits(image))


@contextmanager
def opened(model: str, engine: EngineName = "openvino") -> Iterator[Predictor]:
    """Yield a model by its name or path; several may be open at the same time."""
    path, bundle = load(model)
    reference = ModelRef.of({str(path): bundle})
    spec = EngineSpec(engine, "cpu", "fp32", 1)
    with open_apart(reference, spec) as running:
        yield Predictor(str(path), bundle, spec, running)


@contextmanager
def starter() -> Iterator[Engine]:
    """Yield the engine of ``starter``, on one thread of a CPU."""
    path, bundle = load("starter")
    model = ModelRef.of({str(path): bundle})
    with open_engine(model, EngineSpec("openvino", "cpu", "fp32", 1)) as engine:
        yield engine


def z_scored(image: NDArray[Any]) -> NDArray[np.float32]:
    """Return an image as the network takes it, float32 of the same shape."""
    values = image.astype(np.float32)
    return np.asarray((values - values.mean()) / values.std())


def predict(engine: Engine, image: NDArray[Any], grid: PatchGrid) -> NDArray[np.float32]:
    """Return the blended logits of an image ``(z, y, x)``, float32."""
    patches = Patches(grid)
    block = Block(Box.of(image.shape), z_scored(image)[None], patches, lambda values: values)
    logits: NDArray[np.float32] = blend_patches(block, engine, patches.weights, NUMPY)[0]
    return logits

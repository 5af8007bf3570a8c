"""The models of a plan: one bundle, or several whose logits are averaged, also over mirror images.

Patches stay where they are, so an average does not depend on blocks either.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from itertools import chain, combinations, product
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from megaseg_dask.errors import BundleError
from megaseg_dask.inference.block import Block, BlockOutputs, Engine, Float32
from megaseg_dask.models import Bundle, BundleFacts, Step, load_bundle, read_facts
from megaseg_dask.models.staging import path_of

_SPACE_AXES = (2, 3, 4)  # of a batch (n, c, z, y, x)


@dataclass(frozen=True, slots=True)
class BundleRef:
    """A bundle by address and digest: workers load it and check that it is the plan's."""

    path: str
    name: str
    digest: str
    checkpoint: str | None = None

    @property
    def _path(self) -> Path:
        return path_of(self.path, self.digest)

    def load(self) -> Bundle:
        """Load the bundle, weights included.

        Raises:
            BundleError: The bundle at its address is no longer the plan's.
        """
        bundle = load_bundle(self._path, self.checkpoint)
        self._require_same(bundle)
        return bundle

    def require_unchanged(self) -> None:
        """Check that the bundle at its address is the plan's, without loading its weights.

        Raises:
            BundleError: It is another one.
        """
        self._require_same(read_facts(self._path, self.checkpoint))

    def _require_same(self, bundle: BundleFacts) -> None:
        if bundle.digest != self.digest:
            raise BundleError(
                f"{self.path} has digest {bundle.digest[:12]}, but the plan was made with "
                f"{self.digest[:12]}; restore the bundle, or start again with --overwrite"
            )


@dataclass(frozen=True, slots=True)
class ModelRef:
    """One bundle, or several whose logits are averaged, and what they have in common.

    ``outputs`` are the names of the channels of the logits; ``steps`` turn an
    image into the network's input.
    """

    bundles: tuple[BundleRef, ...]
    window: str
    in_channels: int
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, bundles: Mapping[str, BundleFacts], checkpoint: str | None = None) -> "ModelRef":
        """Return the reference to bundles, given by their addresses.

        Raises:
            BundleError: The bundles differ in what an average has to have in common.
        """
        refs = tuple(
            BundleRef(path, bundle.name, bundle.digest, checkpoint)
            for path, bundle in bundles.items()
        )
        models = [
            cls(
                refs,
                bundle.window,
                bundle.network.in_channels,
                bundle.outputs,
                bundle.preprocessing.steps,
            )
            for bundle in bundles.values()
        ]
        for ref, model in zip(refs, models, strict=True):
            models[0]._require_like(ref, model)
        return models[0]

    def _require_like(self, ref: BundleRef, other: "ModelRef") -> None:
        for field in fields(self):
            mine = getattr(self, field.name)
            theirs = getattr(other, field.name)
            if mine != theirs:
                raise BundleError(
                    f"{ref.path} has {field.name} {theirs}, {self.bundles[0].path} has {mine}; "
                    "averaged models must have the same value"
                )

    @property
    def name(self) -> str:
        """The names of all bundles."""
        return " + ".join(bundle.name for bundle in self.bundles)

    @property
    def digest(self) -> str:
        """The bundle's digest, or that of all digests."""
        digests = [bundle.digest for bundle in self.bundles]
        if len(digests) == 1:
            return digests[0]
        return sha256(" ".join(digests).encode()).hexdigest()


@dataclass(eq=False)
class Averaged(Engine):
    """An engine: the mean of the logits of several engines of one kind.

    With ``is_mirrored`` each engine predicts all eight mirror images of a patch.
    """

    engines: Sequence[Engine]
    is_mirrored: bool

    @property
    def largest_batch(self) -> int | None:  # type: ignore[override]
        """The smallest of the engines', if any has one."""
        limits = [engine.largest_batch for engine in self.engines]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def identity(self) -> str:  # type: ignore[override]
        """Those of all engines."""
        return " ".join(engine.identity for engine in self.engines)

    def __call__(self, patches: Float32) -> Float32:
        """Map prepared patches ``(batch, channels in, z, y, x)`` to the mean logits."""
        mean: Float32 = self._mean(self.engines, patches)
        return mean

    def forward(self, patches: Any) -> Any:
        """Do the same on arrays that live where the engines blend."""
        return self._mean([engine.forward for engine in self.engines], patches)

    def blend_block(self, block: Block, forward: Callable[[Any], Any]) -> Sequence[BlockOutputs]:
        """Return the outputs of a block, blended where the engines do."""
        return self.engines[0].blend_block(block, forward)

    def use_float32(self, *, is_used: bool) -> bool:
        """Let all engines compute in float32, or again in half precision."""
        have_both = [engine.use_float32(is_used=is_used) for engine in self.engines]
        return all(have_both)

    def fall_back(self) -> bool:
        """Let all engines compute in a plainer way; return whether one has another."""
        have_another = [engine.fall_back() for engine in self.engines]
        return any(have_another)

    def close(self) -> None:
        """Close all engines."""
        for engine in self.engines:
            engine.close()

    def _mean(self, networks: Sequence[Callable[[Any], Any]], patches: Any) -> Any:
        passes = list(product(networks, self._mirrors))
        logits = (_predict_mirrored(network, patches, axes) for network, axes in passes)
        return functools.reduce(add, logits) / len(passes)

    @property
    def _mirrors(self) -> Iterator[tuple[int, ...]]:
        """Axes to mirror a batch along, from none to all three of space."""
        max_axes = len(_SPACE_AXES) if self.is_mirrored else 0
        return chain.from_iterable(combinations(_SPACE_AXES, n) for n in range(max_axes + 1))


def _predict_mirrored(network: Callable[[Any], Any], patches: Any, axes: tuple[int, ...]) -> Any:
    if isinstance(patches, np.ndarray):
        mirrored = np.ascontiguousarray(np.flip(patches, axes))
        return np.flip(network(mirrored), axes)
    # A tensor of a device.
    return network(patches.flip(axes)).flip(axes)

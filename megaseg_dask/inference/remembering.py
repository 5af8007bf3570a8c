"""An engine that remembers patches, and lets those that a person waits for go first.

A person who looks at a volume asks for small boxes of it, and each patch touches
many of them. So the logits of a patch are kept under a digest of its prepared
voxels: whoever needs the same patch again, a box or a task of a run, gets the
same bits without another forward pass. What is kept is bounded in bytes; what was
not used for longest goes first.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np

from megaseg_dask.inference.block import Block, BlockOutputs, Engine, Float32


class PatchMemory:
    """Logits of patches by digest, at most ``max_bytes`` of them."""

    def __init__(self, max_bytes: int) -> None:
        """Remember nothing yet."""
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._kept: OrderedDict[bytes, Float32] = OrderedDict()
        self._digests: dict[Hashable, bytes] = {}
        self._names: dict[bytes, list[Hashable]] = {}
        self._lock = threading.Lock()

    @property
    def n_bytes(self) -> int:
        """The bytes of all logits that are kept."""
        return self._n_bytes

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
            self._digests.clear()
            self._names.clear()
            self._n_bytes = 0

    def find(self, digest: bytes) -> Float32 | None:
        """Return the logits ``(channels out, z, y, x)`` of a patch, if they are kept."""
        with self._lock:
            logits = self._kept.get(digest)
            if logits is not None:
                self._kept.move_to_end(digest)
            return logits

    def keep(self, digest: bytes, logits: Float32) -> None:
        """Keep the logits of a patch."""
        with self._lock:
            if digest in self._kept:
                return
            self._kept[digest] = logits
            self._n_bytes += logits.nbytes
            while self._n_bytes > self._max_bytes:
                forgotten, oldest = self._kept.popitem(last=False)
                self._n_bytes -= oldest.nbytes
                for name in self._names.pop(forgotten, ()):
                    del self._digests[name]

    def name(self, name: Hashable, digest: bytes) -> None:
        """Let a patch be found by a name too, as long as it is kept."""
        with self._lock:
            if digest in self._kept and name not in self._digests:
                self._digests[name] = digest
                self._names.setdefault(digest, []).append(name)

    def find_named(self, name: Hashable) -> Float32 | None:
        """Return the logits of a patch that was given a name, if they are kept."""
        with self._lock:
            digest = self._digests.get(name)
        return None if digest is None else self.find(digest)


def digest_of(patch: Float32) -> bytes:
    """Return the digest of a prepared patch ``(channels in, z, y, x)``."""
    return blake2b(np.ascontiguousarray(patch).data, digest_size=16).digest()


class Turns:
    """The one engine, taken for one forward pass at a time: urgent passes first.

    Patient work waits while anything urgent is expected, also between two urgent passes.
    """

    def __init__(self) -> None:
        """Expect nothing yet."""
        self._changed = threading.Condition()
        self._n_urgent = 0
        self._is_taken = False
        self._is_over = False

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Let patient work wait meanwhile."""
        with self._changed:
            self._n_urgent += 1
        try:
            yield
        finally:
            with self._changed:
                self._n_urgent -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Stop all work at its next forward pass."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    @contextmanager
    def take(self, *, is_patient: bool) -> Iterator[None]:
        """Have the engine for one forward pass.

        Raises:
            KeyboardInterrupt: The work is to stop.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._may_take(is_patient))
            if self._is_over:
                # No task fails by it: it is as if the process had been interrupted.
                raise KeyboardInterrupt
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()

    def _may_take(self, is_patient: bool) -> bool:
        if self._is_over:
            return True
        return not self._is_taken and not (is_patient and self._n_urgent)


class Remembering(Engine):
    """An engine whose patches are remembered; tasks use it as any other, and are patient."""

    def __init__(self, engine: Engine, memory: PatchMemory, turns: Turns) -> None:
        """Predict by another engine, which is used by nobody else."""
        self._engine = engine
        self._memory = memory
        self._turns = turns
        self._is_float32 = False

    @property
    def largest_batch(self) -> int | None:  # type: ignore[override]
        """That of the engine."""
        return self._engine.largest_batch

    @property
    def identity(self) -> str:  # type: ignore[override]
        """That of the engine."""
        return self._engine.identity

    def __call__(self, patches: Float32) -> Float32:
        """Map prepared patches ``(batch, channels in, z, y, x)`` to logits of the same form."""
        return self._recall(patches, is_patient=True)

    def predict_now(self, patches: Float32) -> Float32:
        """Do the same for somebody who waits."""
        return self._recall(patches, is_patient=False)

    def forward(self, patches: Any) -> Any:
        """Do the same on arrays that live where the engine blends; those of a GPU are not kept."""
        if isinstance(patches, np.ndarray):
            return self(patches)
        with self._turns.take(is_patient=True):
            return self._engine.forward(patches)

    def blend_block(self, block: Block, forward: Callable[[Any], Any]) -> Sequence[BlockOutputs]:
        """Return the outputs of a block, blended where the engine does."""
        return self._engine.blend_block(block, forward)

    def use_float32(self, *, is_used: bool) -> bool:
        """Let the engine compute in float32; what it then predicts is not remembered."""
        has_both = self._engine.use_float32(is_used=is_used)
        self._is_float32 = is_used and has_both
        return has_both

    def fall_back(self) -> bool:
        """Let the engine compute in a plainer way, and forget what it predicted before."""
        has_another = self._engine.fall_back()
        if has_another:
            self._memory.clear()
        return has_another

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def _recall(self, patches: Float32, *, is_patient: bool) -> Float32:
        if self._is_float32:
            with self._turns.take(is_patient=is_patient):
                return self._engine(patches)
        digests = list(map(digest_of, patches))
        known = self._find(digests)
        if known is None:
            with self._turns.take(is_patient=is_patient):
                # Somebody else may have predicted them while this waited for its turn.
                known = self._find(digests) or self._predict(patches, digests)
        return np.stack(known)

    def _find(self, digests: Sequence[bytes]) -> list[Float32] | None:
        """Return the logits of all patches, or none if one is not kept."""
        found = [self._memory.find(digest) for digest in digests]
        known = [logits for logits in found if logits is not None]
        return known if len(known) == len(digests) else None

    def _predict(self, patches: Float32, digests: Sequence[bytes]) -> list[Float32]:
        """Predict a batch as it is: another shape may take another kernel."""
        # Each in an array of its own: one patch would keep the whole batch in memory.
        predicted = [logits.copy() for logits in self._engine(patches)]
        for digest, logits in zip(digests, predicted, strict=True):
            self._memory.keep(digest, logits)
        return predicted

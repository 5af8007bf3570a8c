"""Train the light network on simulated structures, with the published recipe's loss and optimizer.

    nice -n 19 python -m starter.train RUN_FOLDER --steps 3600

Nothing but `starter.simulation` feeds it. Each image is z-scored as a
whole before patches are cut, as inference does. Checkpoints (network, its
moving average, Adam) go to RUN_FOLDER every few minutes; the same command
continues from the last one. `starter/export.py` makes the bundle.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

# One thread by default: several people may share the machine.
# Set before numpy and torch start theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from monai.losses import GeneralizedDiceFocalLoss
from monai.networks.nets import DynUNet
from scipy import ndimage

from starter.simulation import KINDS, simulate

FILTERS = (8, 16, 24, 32, 48)
IMAGE_SHAPE = (64, 208, 208)
# Instance norm ties the answer to what a patch holds: end at the patch that inference uses.
STAGES = ((0.25, 4, (32, 64, 64)), (0.75, 2, (32, 96, 96)), (1.0, 1, (64, 128, 128)))
# Large objects are the hardest to fill, shells the likeliest to be confused with them.
_KIND_WEIGHTS = {"nuclei": 5.0, "shells": 1.5}
WEIGHTS = np.array([_KIND_WEIGHTS.get(kind, 1.0) for kind in KINDS])
MAX_NORM = 30.0  # gradients of the first steps reach 5
HELD_OUT = 10**9  # seeds from here on are never trained on


def build() -> DynUNet:
    """Return the light network: MegaSeg_v1's architecture with fewer filters."""
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        strides=[1, 2, 2, 2, 2],
        kernel_size=[3] * 5,
        upsample_kernel_size=[2] * 4,
        dropout=0.0,
        res_block=True,
        filters=list(FILTERS),
    )


@dataclass
class Pool:
    """Simulated images that patches are cut from; the oldest makes room for a new one."""

    rng: np.random.Generator
    first_seed: int
    size: int = 32
    images: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    made: int = 0

    def renew(self) -> None:
        """Simulate one image, distort and normalize it."""
        kind = str(self.rng.choice(KINDS, p=WEIGHTS / WEIGHTS.sum()))
        seed = self.first_seed + self.made
        simulated = simulate(seed, IMAGE_SHAPE, kind, difficulty=self.rng.uniform(0, 1))
        image, mask = self.distort(simulated.image.astype(np.float32), simulated.mask)
        self.made += 1
        inside = np.flatnonzero(mask)
        if len(inside):
            inside = self.rng.choice(inside, 2000)
        normalized = ((image - image.mean()) / image.std()).astype(np.float32)
        self.images.append((normalized, mask, inside))
        self.images = self.images[-self.size :]

    def distort(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gamma, smoothing (images that somebody resampled) and coarser z steps."""
        if self.rng.random() < 0.3:
            low = image.min()
            high = image.max()
            image = ((image - low) / (high - low)) ** self.rng.uniform(0.6, 1.5)
        if self.rng.random() < 0.3:
            image = ndimage.gaussian_filter(image, self.rng.uniform(0, 0.9, 3), truncate=2)
        if self.rng.random() < 0.1:
            image = np.concatenate([image[::2], image[::-2]])
            mask = np.concatenate([mask[::2], mask[::-2]])
        return image, mask

    def patch(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Cut a patch, four times in five around some voxel of the structure, turned at random."""
        image, mask, inside = self.images[self.rng.integers(len(self.images))]
        room = np.array(image.shape) - shape
        corner = self.rng.integers(room + 1)
        if len(inside) and self.rng.random() < 0.8:
            middle = np.array(np.unravel_index(self.rng.choice(inside), image.shape))
            corner = np.clip(middle - (self.rng.random(3) * shape).astype(int), 0, room)
        box = tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))
        turns = [slice(None, None, int(self.rng.choice([1, -1]))) for _ in range(3)]
        image = image[box][tuple(turns)]
        mask = mask[box][tuple(turns)]
        if self.rng.random() < 0.5:
            image = image.swapaxes(1, 2)
            mask = mask.swapaxes(1, 2)
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)

    def batch(self, n: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return n patches and their truth, float32 (n, 1, z, y, x)."""
        patches = [self.patch(shape) for _ in range(n)]
        images = np.stack([image for image, _ in patches])[:, None]
        masks = np.stack([mask for _, mask in patches])[:, None]
        return torch.from_numpy(images), torch.from_numpy(masks).float()


def forward(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits in float32; bfloat16 inside is ten times faster on CPUs that have it."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: torch.Tensor = network(images.contiguous(memory_format=torch.channels_last_3d))
    return logits.float()


def keep_bottleneck_float32(network: DynUNet) -> None:
    """Compute the bottleneck in float32, forwards and backwards.

    On torch 2.13's CPU, the bfloat16 weight gradient of a channels-last convolution over so few
    voxels is garbage in one of 25 calls (the same call repeated is not). Here float32 costs next to
    nothing.
    """
    compute = network.bottleneck.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            result: torch.Tensor = compute(x.float())
        return result

    network.bottleneck.forward = forward


def held_out() -> list[tuple[str, torch.Tensor, np.ndarray]]:
    """Return two images of every kind that training never sees: a fair one and a hard one."""
    images = []
    for i, kind in enumerate(KINDS):
        for difficulty, name in ((0.3, kind), (1.0, f"{kind} hard")):
            simulated = simulate(HELD_OUT + i, (64, 128, 128), kind, difficulty)
            image = torch.from_numpy(simulated.image.astype(np.float32))[None, None]
            images.append((name, (image - image.mean()) / image.std(), simulated.mask))
    return images


def validate(
    network: torch.nn.Module, images: list[tuple[str, torch.Tensor, np.ndarray]]
) -> dict[str, float]:
    """Return the Dice of each held-out image."""
    scores = {}
    with torch.inference_mode():
        for name, image, truth in images:
            mask = forward(network, image)[0, 0].numpy() > 0
            dice = 2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1)
            scores[name] = round(float(dice), 3)
    return scores


@dataclass(frozen=True)
class Options:
    """How long to train, how fast, from which seed and weights, and how often to checkpoint."""

    steps: int
    rate: float
    seed: int
    start: Path | None
    checkpoint_s: float


class Training:
    """One training in a folder: network, moving average and optimizer, at a step."""

    def __init__(self, folder: Path, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.saved = folder / "last.pt"
        self.log = folder / "log.jsonl"
        self.network = build().to(memory_format=torch.channels_last_3d)
        self.average = torch.optim.swa_utils.AveragedModel(
            self.network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
        )
        keep_bottleneck_float32(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=options.rate)
        self.loss_of = GeneralizedDiceFocalLoss(sigmoid=True)
        self.step = 0
        self.made = 0
        self.skipped = 0
        self.minutes = 0.0
        self.losses: list[float] = []
        if self.saved.exists():
            self._continue()
        elif options.start is not None:
            self._start_from(options.start)

    def _continue(self) -> None:
        state = torch.load(self.saved, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.made = state["made"]
        self.minutes = state["minutes"]

    def _start_from(self, file: Path) -> None:
        weights = torch.load(file, weights_only=True)["average"]
        del weights["n_averaged"]
        self.network.load_state_dict({k.removeprefix("module."): v for k, v in weights.items()})

    def run(self) -> None:
        """Train to the last step; each checkpoint adds one JSON line of progress to the log."""
        options = self.options
        rng = np.random.default_rng([options.seed, self.step])
        pool = Pool(rng, first_seed=options.seed * 10**6, made=self.made)
        for _ in range(12):
            pool.renew()
        images = held_out()
        earlier_minutes = self.minutes
        began = time.monotonic()
        last_checkpoint = began
        while self.step < options.steps:
            if self.step % 2 == 0:
                pool.renew()
            n, shape = self._stage()
            self._learn(*pool.batch(n, shape))
            self.step += 1
            now = time.monotonic()
            if now - last_checkpoint > options.checkpoint_s or self.step == options.steps:
                last_checkpoint = now
                self.made = pool.made
                self.minutes = earlier_minutes + (now - began) / 60
                self._save(validate(self.average, images))

    def _stage(self) -> tuple[int, tuple[int, int, int]]:
        """Return how many patches a batch has at this step, and their shape."""
        for end, n, shape in STAGES:
            if self.step < end * self.options.steps:
                return n, shape
        raise ValueError(f"step {self.step} is beyond the last stage")

    def _learn(self, x: torch.Tensor, y: torch.Tensor) -> None:
        # Cosine decay after a short warm-up; Adam and the loss are the published recipe's.
        warm = min(1.0, (self.step + 1) / 50)
        decay = 0.5 + 0.5 * math.cos(math.pi * self.step / self.options.steps)
        self.optimizer.param_groups[0]["lr"] = self.options.rate * warm * decay + 1e-6
        self.optimizer.zero_grad()
        loss = self.loss_of(forward(self.network, x), y)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0))
        # Leave out a gradient that is garbage, of whichever layer: see keep_bottleneck_float32.
        if not np.isfinite(loss.item()) or norm >= MAX_NORM:
            self.skipped += 1
            return
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.losses.append(loss.item())

    def _save(self, dice: dict[str, float]) -> None:
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "made": self.made,
            "minutes": self.minutes,
        }
        part = self.saved.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.saved)
        progress = {
            "step": self.step,
            "minutes": round(self.minutes, 1),
            "skipped": self.skipped,
            "loss": round(float(np.mean(self.losses)), 4),
            "dice": round(float(np.mean(list(dice.values()))), 4),
            "each": dice,
        }
        with self.log.open("a") as log:
            log.write(json.dumps(progress) + "\n")
        self.losses = []


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--start", type=Path, help="weights to start from: the last.pt of another run"
    )
    parser.add_argument("--every", type=float, default=180, help="seconds between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    options = Options(args.steps, args.rate, args.seed, args.start, args.every)
    Training(args.folder, options).run()


if __name__ == "__main__":
    main()

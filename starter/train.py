"""Train the light network on simulated structures, with the published recipe's loss and optimiser.

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

# One thread by default: several people may share the machine. Set before numpy and torch start theirs.
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
WEIGHTS = np.array([{"nuclei": 5.0, "shells": 1.5}.get(kind, 1.0) for kind in KINDS])
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
        """Simulate one image, distort and normalise it."""
        kind = str(self.rng.choice(KINDS, p=WEIGHTS / WEIGHTS.sum()))
        made = simulate(
            self.first_seed + self.made, IMAGE_SHAPE, kind, difficulty=self.rng.uniform(0, 1)
        )
        image, mask = self.distort(made.image.astype(np.float32), made.mask)
        self.made += 1
        inside = np.flatnonzero(mask)
        inside = self.rng.choice(inside, 2000) if len(inside) else inside
        self.images.append(
            (((image - image.mean()) / image.std()).astype(np.float32), mask, inside)
        )
        self.images = self.images[-self.size :]

    def distort(self, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gamma, smoothing (images that somebody resampled) and coarser z steps."""
        if self.rng.random() < 0.3:
            low, high = image.min(), image.max()
            image = ((image - low) / (high - low)) ** self.rng.uniform(0.6, 1.5)
        if self.rng.random() < 0.3:
            image = ndimage.gaussian_filter(image, self.rng.uniform(0, 0.9, 3), truncate=2)
        if self.rng.random() < 0.1:
            image, mask = (np.concatenate([a[::2], a[::-2]]) for a in (image, mask))
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
        cut = [a[box][tuple(turns)] for a in (image, mask)]
        if self.rng.random() < 0.5:
            cut = [a.swapaxes(1, 2) for a in cut]
        return np.ascontiguousarray(cut[0]), np.ascontiguousarray(cut[1])

    def batch(self, n: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return n patches and their truth, float32 (n, 1, z, y, x)."""
        images, masks = zip(*(self.patch(shape) for _ in range(n)), strict=True)
        return torch.from_numpy(np.stack(images)[:, None]), torch.from_numpy(
            np.stack(masks)[:, None]
        ).float()


def forward(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits in float32; bfloat16 inside is ten times faster on CPUs that have it."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: torch.Tensor = network(images.contiguous(memory_format=torch.channels_last_3d))
    return logits.float()


def keep_bottleneck_float32(network: DynUNet) -> None:
    """Compute the bottleneck in float32, forwards and backwards.

    On torch 2.13's CPU, the bfloat16 weight gradient of a channels-last convolution over so few
    voxels is garbage in one of 25 calls (the same call repeated is not). It costs next to nothing here.
    """
    compute = network.bottleneck.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            result: torch.Tensor = compute(x.float())
        return result

    network.bottleneck.forward = forward


def held_out() -> list[tuple[str, torch.Tensor, np.ndarray]]:
    """Two images of every kind that training never sees: a fair one and a hard one."""
    images = []
    for i, kind in enumerate(KINDS):
        for difficulty in (0.3, 1.0):
            made = simulate(HELD_OUT + i, (64, 128, 128), kind, difficulty)
            image = torch.from_numpy(made.image.astype(np.float32))[None, None]
            name = kind if difficulty < 1 else f"{kind} hard"
            images.append((name, (image - image.mean()) / image.std(), made.mask))
    return images


def validate(
    network: torch.nn.Module, images: list[tuple[str, torch.Tensor, np.ndarray]]
) -> dict[str, float]:
    """Dice of each held-out image."""
    scores = {}
    with torch.inference_mode():
        for name, image, truth in images:
            mask = forward(network, image)[0, 0].numpy() > 0
            scores[name] = round(
                float(2 * (mask & truth).sum() / max(mask.sum() + truth.sum(), 1)), 3
            )
    return scores


def train(
    folder: Path, steps: int, rate: float, seed: int, start: Path | None, every_s: float
) -> None:
    """Run or continue a training; one JSON line of progress goes to the log at each checkpoint."""
    torch.manual_seed(seed)
    network = build().to(memory_format=torch.channels_last_3d)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    keep_bottleneck_float32(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    loss_of = GeneralizedDiceFocalLoss(sigmoid=True)
    saved, step, made, skipped, minutes = folder / "last.pt", 0, 0, 0, 0.0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, made, minutes = state["step"], state["made"], state["minutes"]
    elif start is not None:
        weights = torch.load(start, weights_only=True)["average"]
        network.load_state_dict(
            {k.removeprefix("module."): v for k, v in weights.items() if k != "n_averaged"}
        )
    pool = Pool(np.random.default_rng([seed, step]), first_seed=seed * 10**6, made=made)
    for _ in range(12):
        pool.renew()
    images, losses = held_out(), []
    begun = marked = time.monotonic()
    while step < steps:
        n, shape = next((n, shape) for end, n, shape in STAGES if step < end * steps)
        # Cosine decay after a short warm-up; Adam and the loss are the published recipe's.
        warm = min(1.0, (step + 1) / 50)
        optimizer.param_groups[0]["lr"] = (
            rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-6
        )
        if step % 2 == 0:
            pool.renew()
        x, y = pool.batch(n, shape)
        optimizer.zero_grad()
        loss = loss_of(forward(network, x), y)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0))
        # Should another layer's gradient turn out garbage (see keep_bottleneck_float32), leave it out.
        if np.isfinite(loss.item()) and norm < MAX_NORM:
            optimizer.step()
            average.update_parameters(network)
            losses.append(loss.item())
        else:
            skipped += 1
        step += 1
        if time.monotonic() - marked > every_s or step == steps:
            marked = time.monotonic()
            spent = minutes + (marked - begun) / 60
            scores = validate(average, images)
            state = {"network": network, "average": average, "optimizer": optimizer}
            state = {name: part.state_dict() for name, part in state.items()}
            torch.save(
                state | {"step": step, "made": pool.made, "minutes": spent}, folder / "last.part"
            )
            (folder / "last.part").replace(saved)
            line = {
                "step": step,
                "minutes": round(spent, 1),
                "skipped": skipped,
                "loss": round(float(np.mean(losses)), 4),
            }
            line |= {"dice": round(float(np.mean(list(scores.values()))), 4), "each": scores}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            losses = []


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
    train(args.folder, args.steps, args.rate, args.seed, args.start, args.every)


if __name__ == "__main__":
    main()

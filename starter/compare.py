"""Compare a starter bundle with an older one and with what thresholds can do.

    python -m starter.compare [--bundle NEW] [--old OLD] [--only PART,PART] [--pictures FOLDER]

Every figure of the model card comes from here. Results are printed, and written after each part
to a JSON file, with the machine. A second command with `--only` adds its parts to that file if
it is about the same bundles and settings; else it begins anew. Parts:

    real        Dice on labelled stacks: hiPSC nuclei, idr0062 (DAPI; LaminB1 as a picture)
    snr         each kind of simulation at signal-to-noise ratios of 1.5, 3 and 10
    hard        each kind at ratios of 1.5 to 3, uneven background, mixed contrast
    mixed       each kind at any difficulty, as a training draws them
    haze        thin structures over strong light of other planes
    depth       8 bits, and saturated
    split       objects of the labelled stacks after --split distance
    voxel-size  a stack and simulations with voxels of half and twice the size
    noise       volumes that hold nothing

The opponents: Otsu's threshold, the same after a Gaussian of one voxel, and local thresholds of a
large grid (thresholds.py), chosen with the truth known: the best one for each row, and the one
that is best for all rows of a group, as a bundle is one for all.
Dice, reliability and the best threshold of a bundle's scores follow from one prediction of each
image (reliability.py). Stacks whose files are absent are left out with a notice.
"""

# ruff: noqa: T201 - a command of its own: its result is what it prints

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

import megaseg_dask
from benchmarks.labelled import DATA, LAMIN, Labelled, iter_stacks
from benchmarks.machine import describe as describe_machine
from benchmarks.prediction import Predictor, opened
from benchmarks.splitting import MIN_SIZE, drop_small, label_objects
from benchmarks.voxel_size import SHAPE as PART_OF_NUCLEI
from benchmarks.voxel_size import scaled
from megaseg_dask.algorithms.components import label_block
from megaseg_dask.algorithms.matching import evaluate
from megaseg_dask.inference.engine_names import EngineName
from megaseg_dask.plan.resolved import DEFAULT_SPLIT_DEPTH
from starter import cases, pictures, thresholds
from starter.cases import Row, Sample, Shape, draw_structure
from starter.reliability import Table, describe

REPOSITORY = Path(__file__).resolve().parents[1]
SHIPPED = REPOSITORY / "megaseg_dask" / "models" / "starter"
RESULT = REPOSITORY / "benchmarks" / "results" / "starter.json"
THRESHOLD = np.float32(0.5)
LOCAL = "best local"
ONE_LOCAL = "one local"
RESCALED_KINDS = ("tubes", "nuclei")
# Of voxels per µm.
SCALES = (0.5, 1.0, 2.0)

Array = np.ndarray[Any, Any]
Result = dict[str, Any]


@dataclass
class Comparison:
    """What is compared, on how much, and where results go."""

    models: Mapping[str, Predictor]
    data: Path
    shape: Shape = (64, 128, 128)
    noise_shape: Shape = (64, 256, 256)
    n: int = 3
    pictures: Path | None = None
    scores_of_stacks: dict[tuple[str, str], Array] = field(default_factory=dict)

    @property
    def settings(self) -> Result:
        """What the results follow from, besides the bundles."""
        return {
            "shape": list(self.shape),
            "noise_shape": list(self.noise_shape),
            "images_of_a_row": self.n,
            "first_seed": cases.FIRST_SEED,
            "split_depth_um": DEFAULT_SPLIT_DEPTH,
            "min_size_of_objects": MIN_SIZE,
            "local_thresholds": {
                "smoothed": thresholds.SMOOTHED,
                "slices_gaussian_block": thresholds.BLOCKS,
                "slices_mean_of": thresholds.BOXES,
                "gaussian_3d": thresholds.SURROUNDINGS,
                "offset_in_deviations": thresholds.OFFSETS,
            },
        }

    def stacks(self) -> list[Labelled]:
        """Return the labelled stacks that are there."""
        wanted = ("nuclei", "idr0062")
        found = [stack for stack in iter_stacks(self.data, None) if stack.name in wanted]
        for name in set(wanted) - {stack.name for stack in found}:
            print(f"{name}: left out, its files are not in {self.data}")
        return found

    def stack_scores(self, model: str, stack: Labelled) -> Array:
        """Return the scores of a stack; they are predicted once."""
        key = (model, stack.name)
        if key not in self.scores_of_stacks:
            self.scores_of_stacks[key] = self.models[model].scores(stack.image)
        return self.scores_of_stacks[key]


# -- Dice, and what scores mean


def measure_real(comparison: Comparison) -> Result:
    """Return Dice and reliability on the labelled stacks; LaminB1 has no labels."""
    groups: dict[str, dict[str, JudgedRow]] = {"real": {}}
    scores_of: Result = {}
    for stack in comparison.stacks():
        print(f"real: {stack.name} {stack.image.shape}", flush=True)
        scores = {name: comparison.stack_scores(name, stack) for name in comparison.models}
        truth = stack.truth > 0
        judged = JudgedRow([judge(Sample(stack.image, truth), scores)])
        groups["real"][stack.name] = judged
        scores_of[stack.name] = judged.about_scores()
        draw(comparison, stack.name, Sample(stack.image, truth), scores)
    lamin = comparison.data / LAMIN
    if comparison.pictures is not None and lamin.is_file():
        image = tifffile.imread(lamin)
        scores = {name: model.scores(image) for name, model in comparison.models.items()}
        draw(comparison, "idr0062 LaminB1", Sample(image, np.zeros(image.shape, bool)), scores)
    return {**describe_rows(groups), "scores": scores_of}


def measure_rows(
    comparison: Comparison, part: str, make_rows: Callable[[Shape, int], list[Row]]
) -> Result:
    """Return Dice of each row and of each group, and reliability of each group."""
    rows = make_rows(comparison.shape, comparison.n)
    groups: dict[str, dict[str, JudgedRow]] = {}
    for number, row in enumerate(rows, 1):
        begun = time.perf_counter()
        groups.setdefault(row.group, {})[row.name] = judge_row(comparison, row)
        took = f"{time.perf_counter() - begun:.1f} s"
        print(f"{part} {number}/{len(rows)}: {row.name}, {took}", flush=True)
    scores: Result = {}
    for group, members in groups.items():
        images = [image for judged in members.values() for image in judged.images]
        scores[group] = JudgedRow(images).about_scores()
    return {**describe_rows(groups), "scores": scores}


def describe_rows(groups: Mapping[str, Mapping[str, "JudgedRow"]]) -> Result:
    """Return Dice of rows and of groups, and the one local threshold of each group."""
    found: Result = {"rows": {}, "means": {}, "one_local": {}}
    for group, members in groups.items():
        if not members:
            continue
        setting = int(np.mean([judged.local for judged in members.values()], axis=0).argmax())
        rows = {name: judged.row(setting) for name, judged in members.items()}
        found["rows"] |= rows
        found["means"][f"{group}, mean"] = mean_row(list(rows.values()))
        found["one_local"][group] = thresholds.local_settings()[setting]
    return found


@dataclass(frozen=True, eq=False)
class JudgedImage:
    """How well each method found the structure of one image."""

    otsu: float
    otsu_smoothed: float
    local: Array
    tables: Mapping[str, Table]


@dataclass(frozen=True, eq=False)
class JudgedRow:
    """The images of a row, judged."""

    images: Sequence[JudgedImage]

    @property
    def local(self) -> Array:
        """The mean Dice of each local threshold."""
        return np.mean([image.local for image in self.images], axis=0)

    def row(self, setting: int) -> Result:
        """Return the mean Dice of each method, and which local threshold was best.

        ``setting`` is the local threshold of the whole group.
        """
        dice = {
            name: float(np.mean([image.tables[name].dice_at_half for image in self.images]))
            for name in self.images[0].tables
        }
        dice["Otsu"] = float(np.mean([image.otsu for image in self.images]))
        dice["Otsu, smoothed"] = float(np.mean([image.otsu_smoothed for image in self.images]))
        dice[ONE_LOCAL] = float(self.local[setting])
        dice[LOCAL] = float(self.local.max())
        rounded = {name: round(value, 4) for name, value in dice.items()}
        return rounded | {"local_setting": thresholds.local_settings()[int(self.local.argmax())]}

    def about_scores(self) -> Result:
        """Return reliability and the best threshold of each bundle."""
        names = self.images[0].tables
        return {name: describe([image.tables[name] for image in self.images]) for name in names}


def judge_row(comparison: Comparison, row: Row) -> JudgedRow:
    """Make the images of a row, predict and judge them."""
    judged = []
    for sample in row.make():
        scores = {name: model.scores(sample.image) for name, model in comparison.models.items()}
        if not judged:
            draw(comparison, row.name, sample, scores)
        judged.append(judge(sample, scores))
    return JudgedRow(judged)


def judge(sample: Sample, scores: Mapping[str, Array]) -> JudgedImage:
    """Judge all methods on one image, by the scores of each bundle."""
    return JudgedImage(
        otsu=evaluate(thresholds.otsu(sample.image), sample.truth).dice,
        otsu_smoothed=evaluate(thresholds.otsu_smoothed(sample.image), sample.truth).dice,
        local=thresholds.local_dice(sample.image, sample.truth),
        tables={name: Table.of(values, sample.truth) for name, values in scores.items()},
    )


def mean_row(rows: Sequence[Result]) -> Result:
    """Return the mean of each method over rows."""
    methods = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in methods}


def draw(comparison: Comparison, name: str, sample: Sample, scores: Mapping[str, Array]) -> None:
    """Draw image, truth (if any) and masks, if pictures are asked for."""
    if comparison.pictures is None:
        return
    masks = {model: values > THRESHOLD for model, values in scores.items()}
    file = comparison.pictures / f"{name.replace(' ', '_').replace(',', '')}.png"
    truth = [sample.truth] if sample.truth.any() else []
    pictures.draw_slices(file, sample.image, [*truth, *masks.values()])


# -- objects


def measure_split(comparison: Comparison) -> Result:
    """Return how well objects are found after --split distance, with smoothed Otsu beside it."""
    rows: Result = {}
    for stack in comparison.stacks():
        masks = {
            name: comparison.stack_scores(name, stack) > THRESHOLD for name in comparison.models
        }
        masks["Otsu, smoothed"] = thresholds.otsu_smoothed(stack.image)
        truth = drop_small(stack.truth.astype(np.int64))
        for name, mask in masks.items():
            print(f"split: {stack.name}, {name}", flush=True)
            labels = drop_small(label_objects(mask, stack.spacing_um, DEFAULT_SPLIT_DEPTH))
            result = evaluate(labels, truth)
            rows[f"{stack.name}, {name}"] = {
                "PQ": round(result.panoptic_quality, 4),
                "AP at IoU 0.5": round(result.matchings[0].average_precision, 4),
                "AP, mean": round(result.mean_average_precision, 4),
                "objects": result.n_predicted,
                "true objects": result.n_true,
            }
    return {"rows": rows}


# -- other voxels


def measure_voxel_size(comparison: Comparison) -> Result:
    """Return Dice of images with other voxels, as they are and at the size of the model."""
    rows: Result = {}
    for stack in iter_rescalable(comparison):
        for scale in SCALES:
            print(f"voxel-size: {stack.name}, voxels × {1 / scale:g}", flush=True)
            image, labels, spacing_um = scaled(stack.image, stack.truth, stack.spacing_um, scale)
            row = {}
            for name, model in comparison.models.items():
                for size in ("source", "model"):
                    scores = megaseg_dask.predict(
                        image,
                        model.path,
                        spacing_um=spacing_um,
                        voxel_size=size,
                        engine=model.spec.engine,
                        precision="fp32",
                        threads=1,
                    )
                    mask = scores.values > THRESHOLD
                    row[f"{name}, {size}"] = round(evaluate(mask, labels > 0).dice, 4)
            rows[f"{stack.name}, voxels × {1 / scale:g}"] = row
    return {"rows": rows}


def iter_rescalable(comparison: Comparison) -> Iterator[Labelled]:
    """Yield a part of the nuclei, and simulations with voxels of the newest model's size."""
    for stack in comparison.stacks():
        if stack.name == "nuclei":
            part = tuple(map(slice, np.minimum(PART_OF_NUCLEI, comparison.shape)))
            yield Labelled("nuclei", stack.image[part], stack.truth[part], stack.spacing_um)
    newest = next(iter(comparison.models.values()))
    size_um = newest.bundle.voxel_size_um
    for number, kind in enumerate(RESCALED_KINDS):
        seed = cases.FIRST_SEED + 6 * 10**6 + 100 * number
        made = draw_structure(
            seed, comparison.shape, kind, 0.5, snr=6.0, haze=0.5, voxel_size_um=size_um
        )
        yield Labelled(f"simulated {kind}", made.image, made.mask.astype(np.uint8), size_um)


# -- nothing


def measure_noise(comparison: Comparison) -> Result:
    """Return how many objects and voxels are found where nothing is; there should be none."""
    rows: Result = {}
    for kind, image in cases.iter_noise(comparison.noise_shape, comparison.n):
        print(f"noise: {kind}", flush=True)
        row = rows.setdefault(kind, {})
        for name, model in comparison.models.items():
            scores = model.scores(image)
            mask = scores > THRESHOLD
            add = {"objects": int(label_block(mask, 1).max()), "voxels": int(mask.sum())}
            for what, count in add.items():
                row[f"{name}, {what}"] = row.get(f"{name}, {what}", 0) + count
            largest = f"{name}, largest score"
            row[largest] = max(row.get(largest, 0.0), round(float(scores.max()), 3))
    return {"images_of_a_row": comparison.n, "rows": rows}


# -- the command

PARTS: dict[str, Callable[[Comparison], Result]] = {
    "real": measure_real,
    "snr": lambda comparison: measure_rows(comparison, "snr", cases.snr_rows),
    "hard": lambda comparison: measure_rows(comparison, "hard", cases.hard_rows),
    "mixed": lambda comparison: measure_rows(comparison, "mixed", cases.mixed_rows),
    "haze": lambda comparison: measure_rows(comparison, "haze", cases.haze_rows),
    "depth": lambda comparison: measure_rows(comparison, "depth", cases.depth_rows),
    "split": measure_split,
    "voxel-size": measure_voxel_size,
    "noise": measure_noise,
}


def compare(comparison: Comparison, parts: Sequence[str], file: Path) -> Result:
    """Measure parts, print each and write the file after each; return all that it holds."""
    bundles = {
        name: {
            "digest": model.bundle.digest,
            "patch": list(model.bundle.patch_shape),
            "overlap": list(model.bundle.overlap),
            "voxel_size_um": model.bundle.voxel_size_um,
        }
        for name, model in comparison.models.items()
    }
    # As it will be read, so that it can be compared with what is there.
    about = json.loads(json.dumps({"bundles": bundles, "settings": comparison.settings}))
    for part in parts:
        begun = time.process_time()
        found = PARTS[part](comparison)
        found["cpu_s"] = round(time.process_time() - begun, 1)
        # Now, not at first: another command may have added other parts meanwhile.
        result = _read_kept(file, about)
        result["parts"][part] = found
        result["machine"] = describe_machine()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print_part(part, found)
        if comparison.pictures is not None:
            for group, about_models in found.get("scores", {}).items():
                of_models = {name: each["reliability"] for name, each in about_models.items()}
                name = group.replace(" ", "_")
                pictures.draw_reliability(
                    comparison.pictures / f"reliability_{name}.png", group, of_models
                )
    return _read_kept(file, about)


def _read_kept(file: Path, about: Result) -> Result:
    """Return what a file holds of the same bundles and settings, else an empty result."""
    if file.is_file():
        kept = json.loads(file.read_text())
        if all(kept.get(name) == value for name, value in about.items()):
            return dict(kept)
    return {**about, "parts": {}}


def print_part(part: str, found: Result) -> None:
    """Print the tables of a part."""
    print_table(part, {**found["rows"], **found.get("means", {})})
    for group, setting in found.get("one_local", {}).items():
        print(f"one local threshold for {group}: {setting}")
    scores = found.get("scores", {})
    about = {
        f"{group}, {model}": _shown(each)
        for group, by_model in scores.items()
        for model, each in by_model.items()
    }
    print_table(f"{part}: scores", about)
    dice = {
        f"{group}, {model}": each["dice"]
        for group, by_model in scores.items()
        for model, each in by_model.items()
        if "dice" in each
    }
    print_table(f"{part}: Dice at thresholds", dice)
    print(f"{part}: {found['cpu_s']} CPU seconds\n", flush=True)


def _shown(about: Result) -> Result:
    names = {
        "best_threshold": "best at",
        "dice_at_best": "Dice there",
        "dice_at_half_less_best": "0.5 less best",
        "expected_error": "ECE",
        "expected_error_of_doubtful": "ECE 0.1-0.9",
    }
    return {shown: about[name] for name, shown in names.items() if name in about}


def print_table(title: str, rows: Mapping[str, Result]) -> None:
    """Print rows of named values, aligned."""
    if not rows:
        return
    columns = list(next(iter(rows.values())))
    wide = {column: max(len(column), 8) for column in columns}
    first = max(len(title), *map(len, rows))
    print("\n" + "  ".join([f"{title:{first}}", *(f"{name:>{wide[name]}}" for name in columns)]))
    for name, row in rows.items():
        cells = [f"{_cell(row.get(column, '')):>{wide[column]}}" for column in columns]
        print("  ".join([f"{name:{first}}", *cells]))


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Read the command line, and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default=str(SHIPPED), help="a bundle; the shipped one if none")
    parser.add_argument("--old", help="another bundle, for a column of its own")
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}; all of them if none")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of idr0062")
    parser.add_argument("--json", type=Path, default=RESULT, help="where results are written")
    parser.add_argument("--pictures", type=Path, help="a folder for PNGs to look at")
    parser.add_argument("--n", type=int, default=3, help="images of a row")
    parser.add_argument("--engine", choices=("openvino", "torch"), default="openvino")
    args = parser.parse_args()
    parts = args.only.split(",") if args.only else list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {', '.join(PARTS)}")
    engine: EngineName = args.engine
    with ExitStack() as stack:
        models = {"new": stack.enter_context(opened(args.bundle, engine))}
        if args.old is not None:
            models["old"] = stack.enter_context(opened(args.old, engine))
        comparison = Comparison(models, args.data, n=args.n, pictures=args.pictures)
        compare(comparison, parts, args.json)


if __name__ == "__main__":
    main()

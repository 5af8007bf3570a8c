"""The tables of docs/performance.md and of the starter's card, from the kept results.

``python -m benchmarks.tables`` writes them again.

A table stands between ``<!-- table NAME -->`` and ``<!-- end -->``; a test
compares each with its results, so no page keeps a number that was measured
before the last change.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS

_ROOT = Path(__file__).parents[1]
PAGES = (_ROOT / "docs/performance.md", _ROOT / "megaseg_dask/models/starter/MODEL_CARD.md")

Rows = Iterable[Iterable[object]]


def field(found: dict[str, Any]) -> str:
    """Return the table of one field: each engine against MONAI."""
    windows = found["windows"]
    monai_s = found["monai_s"]
    rows = [
        [
            "MONAI `sliding_window_inference`, eager",
            windows,
            f"{monai_s / windows:.2f}",
            monai_s,
            1,
            "",
            1,
            0,
        ]
    ]
    nnunet = found.get("nnunet", {})
    if "wall_s" in nnunet:
        pace = f"{nnunet['wall_s'] / nnunet['windows']:.2f}"
        rows.append(
            [
                "nnU-Net v2's predictor, windows elsewhere",
                nnunet["windows"],
                pace,
                nnunet["wall_s"],
                _ratio(monai_s, nnunet["wall_s"]),
                "",
                *_agreement(nnunet),
            ]
        )
    for name, case in found["ours"].items():
        agreement = ["other windows, another answer", ""]
        if case["patches"] == windows:
            agreement = _agreement(case)
        share = f"{100 * case['share_not_inference']:.0f} %"
        rows.append(
            [
                f"ours, {name}",
                case["patches"],
                f"{case['patch_s']:.2f}",
                case["task_s"],
                _ratio(monai_s, case["task_s"]),
                share,
                *agreement,
            ]
        )
    return _table(
        [
            "",
            "windows",
            "s a window",
            "s in all",
            "MONAI ÷ it",
            "not inference",
            "Dice with MONAI",
            "largest difference",
        ],
        rows,
    )


def codecs(found: dict[str, Any]) -> str:
    """Return what codecs write and read of an image, scores and labels."""
    return _by_kind(found["codecs"], "codec")


def chunks(found: dict[str, Any]) -> str:
    """Return what chunks of different size write and read."""
    ours = "shards of 66×375×464 (ours)"
    return _by_kind(
        {kind: {**by, ours: found[ours][kind]} for kind, by in found["chunks"].items()}, "chunks"
    )


def pipelines(found: dict[str, Any]) -> str:
    """Return what codec pipelines and threads write and read of an image."""
    rows = [[name, _speed(case)] for name, case in found["image_by_pipeline"].items()]
    return _table(["pipeline, store, threads", "image: write / read, MB/s"], rows)


def timeline(found: dict[str, Any]) -> str:
    """Return how busy the engine is with one task in hand and with three."""
    rows = [
        [name, case["fields_per_s"], f"{100 * case['inference_busy']:.0f} %", case["median_wait_s"]]
        for name, case in found["worker"].items()
    ]
    return _table(
        ["inference of a field, tasks in hand", "fields/s", "engine busy", "it waits, median s"],
        rows,
    )


def volumes(found: dict[str, Any]) -> str:
    """Return large volumes within a memory budget: the largest peak, and the wall time."""
    rows = []
    for case in (found[name] for name in ("volume_8gb", "volume_64gb")):
        peak = max(case["peak_gb"].values())
        projected = max(case["projected_gb"].values())
        shape = "×".join(map(str, case["shape"]))
        rows.append(
            [
                f"{shape}, {case['source_gb']} GB",
                case["memory_gb"],
                case["workers"],
                projected,
                peak,
                case["wall_s"],
                case["mvoxels_per_s"],
            ]
        )
    return _table(
        [
            "volume",
            "`--memory`, GB",
            "workers",
            "projected",
            "measured peak",
            "seconds",
            "Mvoxel/s",
        ],
        rows,
    )


def many(found: dict[str, Any]) -> str:
    """Return runs of very many tasks that do nothing."""
    rows = [
        [
            name,
            f"{case['tasks']:,}",
            f"{case['tasks_per_s']:,}",
            case["client_mb"]["peak"],
            case["scheduler_peak_mb"],
            case["already_done_s"],
        ]
        for name, case in (
            ("all stages", found["all_stages"]),
            ("one large stage", found["one_stage"]),
        )
    ]
    return _table(
        [
            "empty tasks",
            "n",
            "tasks/s",
            "client, peak MB",
            "scheduler, peak MB",
            "finished run again, s",
        ],
        rows,
    )


def labels(found: dict[str, Any]) -> str:
    """Return labels of one mask by us, by dask-image and of the whole volume at once."""
    rows = []
    for kind, by_shape in found["labels"].items():
        for shape, case in by_shape.items():
            n = case["ours"]["n_objects"]
            rows.append(
                [
                    f"{kind}, {shape.replace('x', '×')}",
                    f"{n:,}",
                    *map(_took, map(case.get, _VARIANTS)),
                ]
            )
    return _table(
        [
            "mask",
            "objects",
            "ours, blocks of 128³",
            "dask-image, same blocks",
            "scikit-image, whole",
            "cc3d, whole",
        ],
        rows,
    )


def joins(found: dict[str, Any]) -> str:
    """Return joins of tables of fragments."""
    rows = [
        [
            f"{case['n_fragments']:,}",
            f"{case['n_pairs']:,}",
            case["wall_s"],
            round(case["peak_bytes"] / 1e9, 2),
            round(case["projected_bytes"] / 1e9, 2),
        ]
        for case in found["join"]["faces"]
    ]
    return _table(["fragments", "pairs", "seconds", "peak, GB", "projected, GB"], rows)


def whole_job(found: dict[str, Any]) -> str:
    """Return the whole job against a script of dask, dask-image and ome-zarr."""
    rows = [
        [
            name,
            found[f"{who}_s"],
            f"{found[f'objects_{who}']:,} of {found['objects_unsplit']:,}",
            f"{found[f'voxels_differ_{who}']:,}",
            f"{found[f'largest_difference_{who}']:.1g}",
        ]
        for who, name in (("ours", f"ours, {found['engine']}"), ("script", "the script"))
    ]
    return _table(
        [
            "",
            "seconds",
            "objects, of the unsplit",
            "voxels of the mask that differ",
            "largest difference",
        ],
        rows,
    )


def plate(found: dict[str, Any]) -> str:
    """Return plates: many small fields, and real nuclei by one and two workers."""
    fields = found["fields"]
    case = found["plate"]
    sizes = [
        fields[f"scheduler_and_client_{when}_mb"][1] for when in ("after_a_third", "at_the_end")
    ]
    rows = [
        [
            f"{fields['fields']} fields of 16×64×64, empty engine, 2 workers",
            fields["fields_per_s"],
            *sizes,
        ],
        *(
            [f"{case['volumes']} volumes of 24×64×72, `starter`, {name}", pace, "", ""]
            for name, pace in case["volumes_per_s"].items()
        ),
    ]
    return _table(["plate", "volumes/s", "client after a third, MB", "at the end"], rows)


_VARIANTS = ("ours", "dask_image", "whole", "cc3d")


def certificates(found: dict[str, Any]) -> str:
    """Return the table of engines and precisions on real images, and of wrong networks."""
    images = found["images"]
    names = next(iter(images.values()))
    rows = []
    for name in names:
        cells: list[object] = [name]
        for image in images.values():
            case = image[name]
            verdict = "" if case["holds"] else ", refused"
            cells.append(f"{case['dice']:.6f}, {case['largest_difference']:.1g}{verdict}")
        rows.append(cells)
    return _table(["", *images], rows)


def passes(found: dict[str, Any]) -> str:
    """Return the table of one window on one thread: each engine against MONAI."""
    gflop = found["gflop"]
    names = found[next(iter(gflop))]
    rows = []
    for name in names:
        cells: list[object] = [name]
        for network in gflop:
            case = found[network].get(name)
            if case is None:
                cells += [""] * 3
                continue
            pace = gflop[network] / case["cpu_s"]
            # The peak of all cases: kernels of fewer instructions have a lower one of their own.
            peak = max(each["peak_gflop_per_s"] for each in found[network].values())
            ratio = _ratio(found[network]["MONAI eager"]["cpu_s"], case["cpu_s"])
            cells += [f"{case['cpu_s']:.2f}", ratio, f"{100 * pace / peak:.0f} %"]
        rows.append(cells)
    head = [""]
    for network in gflop:
        head += [f"{network}, s", "MONAI ÷ it", "of the peak in float32"]
    return _table(head, rows)


# -- the card of the starter

_METHODS = {
    "old": "old",
    "new": "new",
    "Otsu": "Otsu",
    "Otsu, smoothed": "Otsu, smoothed",
    "one local": "local, one for all",
    "best local": "local, best for the row",
}
_BUNDLES = ("old", "new")


def starter_stacks(found: dict[str, Any]) -> str:
    """Return the Dice on real stacks, beside thresholds."""
    return _dice("stack", found["parts"]["real"]["rows"])


def starter_groups(found: dict[str, Any]) -> str:
    """Return the mean Dice of each group of simulations, beside thresholds."""
    rows: dict[str, Any] = {}
    for part in ("snr", "hard", "mixed", "haze", "depth"):
        rows |= found["parts"][part]["means"]
    return _dice("simulations", rows)


def starter_kinds(found: dict[str, Any]) -> str:
    """Return the Dice of each kind at each signal-to-noise ratio, by three methods."""
    rows = found["parts"]["snr"]["rows"]
    hard = found["parts"]["hard"]["rows"]
    kinds = [name.removeprefix("hard ") for name in hard]
    ratios = list(dict.fromkeys(name.split(", ")[1] for name in rows))
    lines = []
    for kind in kinds:
        of_kind = [rows[f"{kind}, {ratio}"] for ratio in ratios]
        lines.append([kind.replace("_", " "), *map(_three, [*of_kind, hard[f"hard {kind}"]])])
    return _table(["old / new / best local", *ratios, "hard"], lines)


def starter_haze(found: dict[str, Any]) -> str:
    """Return the Dice of thin structures over strong light of other planes."""
    return _dice("thin structures", found["parts"]["haze"]["rows"])


def starter_scores(found: dict[str, Any]) -> str:
    """Return what the scores of the new bundle mean, and those of the old."""
    rows = []
    for part in ("real", "mixed", "hard", "haze"):
        for group, models in found["parts"][part]["scores"].items():
            cells = []
            for model in _BUNDLES:
                about = models[model]
                cells += [
                    f"{about['best_threshold']:.2f}",
                    f"{-about['dice_at_half_less_best']:.3f}",
                    f"{about['expected_error']:.3f}",
                ]
            rows.append([group, *cells])
    head = ["images"]
    for model in _BUNDLES:
        head += [f"{model}: best threshold", "Dice lost at 0.5", "calibration error"]
    return _table(head, rows)


def starter_objects(found: dict[str, Any]) -> str:
    """Return how well objects are found after --split distance."""
    rows = []
    for name, case in found["parts"]["split"]["rows"].items():
        stack, _, method = name.partition(", ")
        objects = f"{case['objects']} of {case['true objects']}"
        rows.append([stack, method, case["PQ"], case["AP at IoU 0.5"], case["AP, mean"], objects])
    return _table(["stack", "mask", "PQ", "AP at IoU 0.5", "AP, 0.5 to 0.95", "objects"], rows)


def starter_voxels(found: dict[str, Any]) -> str:
    """Return the Dice with voxels of other sizes."""
    rows = found["parts"]["voxel-size"]["rows"]
    columns = list(next(iter(rows.values())))
    lines = [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in rows.items()]
    return _table(["image", *(f"`{column}`" for column in columns)], lines)


def starter_noise(found: dict[str, Any]) -> str:
    """Return objects and voxels that are found where nothing is."""
    rows = []
    for kind, case in found["parts"]["noise"]["rows"].items():
        cells = [
            f"{case[f'{model}, objects']:,} ({case[f'{model}, voxels']:,})" for model in _BUNDLES
        ]
        rows.append([kind, *cells, f"{case['new, largest score']:.2f}"])
    return _table(
        ["noise", *(f"{model}: objects (voxels)" for model in _BUNDLES), "new: largest score"], rows
    )


def _dice(first: str, rows: dict[str, Any]) -> str:
    lines = []
    for name, row in rows.items():
        best = max(row[method] for method in _METHODS)
        cells = [_bold(row[method], best) for method in _METHODS]
        lines.append([name.replace("_", " "), *cells])
    return _table([first, *_METHODS.values()], lines)


def _bold(value: float, best: float) -> str:
    return f"**{value:.3f}**" if value == best else f"{value:.3f}"


def _three(row: dict[str, Any]) -> str:
    return " / ".join(f"{row[method]:.2f}" for method in (*_BUNDLES, "best local"))


# -- all tables

TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "field": ("field", field),
    "field MegaSeg_v1": ("field_v1", field),
    "passes": ("passes", passes),
    "certificates": ("certificates", certificates),
    "script": ("script", whole_job),
    "codecs": ("io", codecs),
    "chunks": ("io", chunks),
    "pipelines": ("io", pipelines),
    "timeline": ("timeline", timeline),
    "volumes": ("scale", volumes),
    "many": ("scale", many),
    "plate": ("scale", plate),
    "labels": ("join", labels),
    "joins": ("join", joins),
    "stacks": ("starter", starter_stacks),
    "groups": ("starter", starter_groups),
    "kinds": ("starter", starter_kinds),
    "haze": ("starter", starter_haze),
    "scores": ("starter", starter_scores),
    "objects": ("starter", starter_objects),
    "voxels": ("starter", starter_voxels),
    "noise": ("starter", starter_noise),
}


def filled(page: str) -> str:
    """Return a page with its tables as the kept results are now."""

    def table(match: re.Match[str]) -> str:
        result, make = TABLES[match[1]]
        kept = json.loads((RESULTS / f"{result}.json").read_text())
        return f"<!-- table {match[1]} -->\n{make(kept)}\n<!-- end -->"

    return re.sub(r"<!-- table ([^>]+) -->\n.*?<!-- end -->", table, page, flags=re.S)


def _table(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _by_kind(found: dict[str, dict[str, Any]], what: str) -> str:
    names = next(iter(found.values()))
    rows = [[name, *_speeds(found, name)] for name in names]
    return _table([what, *(f"{kind}: write / read, MB/s (× smaller)" for kind in found)], rows)


def _speeds(found: dict[str, dict[str, Any]], name: str) -> list[str]:
    return [_speed(by_name[name]) for by_name in found.values()]


def _speed(case: dict[str, Any]) -> str:
    return f"{case['write_mb_s']} / {case['read_mb_s']} (×{case['times_smaller']})"


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.1f}"


def _agreement(case: dict[str, Any]) -> list[str]:
    return [f"{case['dice_with_monai']:.6f}", f"{case['largest_difference']:.1g}"]


def _took(case: dict[str, Any] | None) -> str:
    if case is None:
        return "had failed before"
    if "failed" in case:
        return str(case["failed"])
    return f"{case['wall_s']} s, {case['peak_bytes'] / 1e9:.2f} GB"


def fill() -> None:
    """Write the tables of the pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    fill()

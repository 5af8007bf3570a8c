"""The tables of docs/performance.md, from the kept results.

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

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"

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
    """Write the tables of the page."""
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    fill()

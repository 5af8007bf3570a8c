"""Commands that look, and write no image: ``report``, ``view``, ``evaluate`` and ``doctor``."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import typer

from megaseg_dask.cli.console import print_evaluation, print_findings, reporter
from megaseg_dask.cli.exit_codes import Json, echo, echo_result, exit_codes, warn
from megaseg_dask.cli.jobs import Recorded
from megaseg_dask.cli.options import STORE, given, open_stores, settings_of
from megaseg_dask.events import Step
from megaseg_dask.messages import count

RunName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Label name of the run; needed if TARGET has several runs."),
]


def report(
    target: Recorded,
    *,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where to write. (default: TARGET[.NAME].report.html)"),
    ] = None,
    label_name: RunName = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Write one HTML page about a run: quality control, timings, and a check of block borders.

    The page opens offline in any browser. If the output is large, the page shows samples of it and
    says so.

    \b
    Example:
      megaseg report segmented.zarr --out monday.html
    """
    with exit_codes(json_):
        open_stores(options, None)
        from megaseg_dask.tools.report.write import write_report

        page = write_report(target, out, label_name)
        if json_:
            echo_result({"report": page.url, "exit_code": 0})
        else:
            echo(f"report in {page}")


def view(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="Output of segment, or any other OME-Zarr.")
    ],
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Predict scores where you look, with this model, as segment does. Without it, "
            "only stored scores are shown.",
            show_default=False,
        ),
    ] = None,
    record_at: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="TARGET",
            help="With --model: record the blocks that you look at in this target. megaseg "
            "segment with the same options then computes the rest.",
        ),
    ] = None,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the address; do not open a browser.")
    ] = False,
    label_name: RunName = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="LABELS",
            help="True labels to compare with: the name of a label image of the image, or the "
            "address of one. For a plate, give a plate or PLATE/NAME.",
        ),
    ] = None,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show the image, scores and labels in a browser. Ctrl-C ends it.

    Double-click an object to select it and to see it in 3D. A slider shows the objects at other
    thresholds, and the command that applies a threshold. The key ? lists all keys. The page works
    offline, and only this machine can open it. The exit code is that of megaseg status: 3 if a run
    there is not finished, 1 if something failed.

    With --model it predicts scores where you look, with the options of segment: you see the scores
    that a run would write.

    \b
    Examples:
      megaseg view segmented.zarr
      megaseg view cells.zarr --model starter
      megaseg view cells.zarr --model starter --target segmented.zarr
      megaseg view segmented.zarr --truth annotated.zarr/labels/nuclei
      megaseg view s3://results/plate.zarr --no-browser
    """
    with exit_codes(json_):

        def announce(url: str) -> None:
            if json_:
                echo(json.dumps({"event": "view", "url": url}))
            else:
                echo(f"{url}\nonly this machine can open it; Ctrl-C ends it")

        if model:
            chosen = {**options, "model": model, "label_name": label_name}
            _view_live(target, record_at, chosen, announce, truth, not no_browser)
            return
        _require_no_prediction(options, record_at)
        open_stores(options, None)
        from megaseg_dask.tools.view.viewer import view as run_view

        exit_code = run_view(
            target,
            label_name,
            announce,
            truth=truth,
            unmarked=options["unmarked"],
            browser=not no_browser,
        )
        raise typer.Exit(exit_code)


def _view_live(
    source: str,
    target: str | None,
    options: dict[str, Any],
    announce: Callable[[str], None],
    truth: str | None,
    browser: bool,
) -> None:
    """Predict where somebody looks, until interrupted."""
    settings = settings_of(options)
    with reporter(as_json=False, quiet=False) as emit:
        emit(Step("reading the image and the model"))
        from megaseg_dask.run.looking import Looking

        looking = Looking(source, target, settings, emit)
    from megaseg_dask.tools.view.live import view_live

    view_live(looking, source, announce, truth=truth, unmarked=settings.unmarked, browser=browser)
    if target is not None:
        from megaseg_dask.plan.command_line import command_line

        command = command_line(
            "segment", source, target, settings=settings, options=type(settings).model_fields
        )
        what = "no part is recorded; the whole"
        if looking.n_recorded:
            what = "what you looked at is recorded; the rest"
        echo(f"{what}: {command}", err=True)


def _require_no_prediction(options: dict[str, Any], target: str | None) -> None:
    """Require that no option of predictions is given without a model.

    Raises:
        SettingsError: One is; it is named.
    """
    names = [name for name in given(options) if name not in (*STORE, "unmarked")]
    if not names and target is None:
        return
    from megaseg_dask.errors import SettingsError
    from megaseg_dask.plan.settings import option_text

    texts = list(map(option_text, names))
    if target is not None:
        texts.append("--target")
    raise SettingsError(f"{', '.join(texts)}: only for predictions; add --model NAME")


def evaluate(
    predicted: Annotated[
        str, typer.Argument(metavar="PREDICTED", help="Label image, or an image with labels.")
    ],
    truth: Annotated[
        str,
        typer.Argument(metavar="TRUTH", help="Label image of the same shape, or an image with it."),
    ],
    *,
    label: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the label image in PREDICTED, if it has several."
        ),
    ] = None,
    truth_label: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the label image in TRUTH, if it has several."),
    ] = None,
    unmarked: Annotated[
        bool,
        typer.Option(
            "--unmarked", help="Take images as label images, even if their metadata do not say so."
        ),
    ] = False,
    ignore: Annotated[
        list[int] | None,
        typer.Option(
            metavar="ID",
            help="Id in TRUTH that marks voxels without annotation; they are left out, as are all "
            "ids below 0. Repeat the option for several ids.",
            show_default=False,
        ),
    ] = None,
    true_tracks: Annotated[
        str | None,
        typer.Option(
            "--truth-tracks",
            metavar="FILE",
            help="True tracks, for TRA and LNK: GEFF, or a text file of the Cell Tracking "
            "Challenge; ids in TRUTH are then those of tracks.",
        ),
    ] = None,
    tracks: Annotated[
        str | None,
        typer.Option(
            metavar="GEFF",
            help="Tracks of PREDICTED. (default: the tracks that megaseg track wrote beside "
            "PREDICTED)",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print comma-separated lines, for a spreadsheet.")
    ] = False,
    json_: Json = False,
    **options: Any,
) -> None:
    """Compare predicted labels with true labels: Dice, IoU, average precision, panoptic quality.

    SEG and DET are those of the Cell Tracking Challenge. Timepoints are compared one by one, and
    counted together.

    \b
    Examples:
      megaseg evaluate segmented.zarr nuclei.zarr
      megaseg evaluate segmented.zarr truth.zarr --truth-tracks man_track.txt
    """
    with exit_codes(json_):
        from megaseg_dask.errors import SettingsError
        from megaseg_dask.stores import Location
        from megaseg_dask.tools.evaluate import (
            compare_images,
            evaluation_of,
            find_labels,
            find_tracks,
            require_labels,
            score_lineages,
        )

        if tracks and not true_tracks:
            raise SettingsError(f"--tracks {tracks}: give the true tracks, too: --truth-tracks")
        open_stores(options, None)
        compared = (find_labels(predicted, label), find_labels(truth, truth_label))
        if not unmarked:
            for labels in compared:
                require_labels(labels)
        comparison = compare_images(*compared, ignored=ignore or (), tell=warn)
        evaluation = evaluation_of(comparison)
        scores = evaluation.as_dict()
        if true_tracks:
            found = Location.of(tracks) if tracks else find_tracks(compared[0])
            of_tracks = score_lineages(comparison, found, Location.of(true_tracks))
            scores |= asdict(of_tracks)
        if evaluation.left_out_voxels:
            warn(
                "ignored because their tasks failed (missing_boxes): "
                f"{count(evaluation.left_out_voxels, 'voxel')}; run the same megaseg segment "
                "command again to compute them"
            )
        if json_:
            echo_result(scores)
        else:
            print_evaluation(scores, csv=csv)


def doctor(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ADDRESS]…", help="Sources and targets to check.", show_default=False
        ),
    ] = None,
    *,
    json_: Json = False,
    **options: Any,
) -> None:
    """Show the hardware of this machine, which engine auto chooses and why, and common problems.

    For each address, it shows whether the store answers, which image is there, whether a run could
    write there, and how fast the store is. The exit code is 1 if an address cannot be used. --anon
    applies to the first address.

    \b
    Examples:
      megaseg doctor
      megaseg doctor s3://screens/plate.zarr s3://results/plate.zarr
    """
    with exit_codes(json_):
        from megaseg_dask.tools.doctor.machine import examine

        tried = addresses or []
        open_stores(options, tried[0] if tried else None)
        is_fatal = print_findings(examine(tried), as_json=json_)
        raise typer.Exit(int(is_fatal))

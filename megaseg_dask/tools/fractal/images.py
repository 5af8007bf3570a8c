"""A Fractal workflow on images: one job plans all of them, and each is a run of its own.

Fractal runs the jobs of images beside each other, and starts those again that
failed. So each image is source and target of a run, and no job waits for another.
What follows from the machine and can change a bit is chosen by the job that plans,
once for all images.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

from megaseg_dask.errors import MegasegError, SettingsError, SourceError, TargetError, TaskError
from megaseg_dask.events import Event, Result
from megaseg_dask.messages import (
    Narrator,
    count,
    doubt_line,
    failure_line,
    first_few,
    result_line,
)
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.request import Request
from megaseg_dask.run.runner import segment
from megaseg_dask.tools.fractal.arguments import DEFAULTS

logger = logging.getLogger("megaseg")

Options = Mapping[str, object]


def plan(zarr_urls: Sequence[str], options: Options) -> list[dict[str, object]]:
    """Return the jobs of a workflow: one for each image, with all that changes its result.

    Nothing is written. An image that cannot be segmented is named, and has a job too: it fails, and
    Fractal shows which one.

    Raises:
        MegasegError: No image can be segmented.
    """
    if not zarr_urls:
        raise SettingsError("there is no image to segment; choose images in Fractal")
    emit = _logged()
    options = {**DEFAULTS, **options}
    settings = parse_settings(options)
    chosen: dict[str, object] = {}
    refused: dict[str, MegasegError] = {}
    for url in zarr_urls:
        try:
            # The jobs run elsewhere: what this machine is quick at says nothing about theirs.
            [(planned, _)] = Request(url, url, settings, emit, is_here=False).open_runs()
        except (SettingsError, SourceError, TargetError) as error:
            logger.warning("%s: %s", url, error)
            refused[url] = error
            continue
        chosen = chosen or _chosen(planned)
    if not chosen:
        raise next(iter(refused.values()))
    logger.info("planned %s", count(len(zarr_urls), "image"))
    if refused:
        logger.warning(
            "%s cannot be segmented: %s", count(len(refused), "image"), first_few(refused)
        )
    return [{"zarr_url": url, "init_args": {"options": {**options, **chosen}}} for url in zarr_urls]


def _chosen(planned: Plan) -> dict[str, object]:
    """Return the options that a plan took from its machine and that can change a bit."""
    engine = planned.resolved.engine
    chosen: dict[str, object] = {
        "engine": engine.engine,
        "device": engine.device,
        "threads": engine.threads,
        "batch": planned.resolved.batch,
    }
    if engine.device == "cpu":
        # On a GPU the choice is the same everywhere.
        chosen["precision"] = engine.precision
    return chosen


def segment_in_place(zarr_url: str, options: Options) -> None:
    """Write labels and measurements into an image, or what an earlier job left of them.

    Raises:
        MegasegError: The image cannot be segmented, or parts of it failed.
    """
    result = segment(zarr_url, zarr_url, parse_settings(options), emit=_logged())
    _log_result(result)
    if result.status != "done":
        failures = "; ".join(map(failure_line, result.failures[:3]))
        raise TaskError(f"{zarr_url}: {count(len(result.failures), 'failure')}: {failures}")


def _logged() -> Callable[[Event], None]:
    """Return what writes events to the log of this job."""
    narrator = Narrator()

    def log(event: Event) -> None:
        for line in narrator.lines(event):
            logger.info(line)

    return log


def _log_result(result: Result) -> None:
    for warning in result.warnings:
        logger.warning(warning)
    for doubt in result.doubts:
        logger.warning(doubt_line(doubt))
    logger.info(result_line(result))

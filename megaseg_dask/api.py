"""What Python users call: `segment`, `relabel`, progress in a notebook, and what a result gives.

Their keywords are the declared settings: signatures and help are made from them.
"""

import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaseg_dask import events
from megaseg_dask.errors import SettingsError
from megaseg_dask.events import Emit, Event, PatchProgress, Progress, Step
from megaseg_dask.messages import failed_text, left_text, nearest, patches_text, stage_phrase
from megaseg_dask.plan.plan import Plan
from megaseg_dask.plan.relabelling import RESULT, WORK
from megaseg_dask.plan.settings import Settings, parse_settings
from megaseg_dask.plan.signature import with_settings
from megaseg_dask.run.runner import relabel as run_relabel
from megaseg_dask.run.runner import segment as run_segment
from megaseg_dask.run.status import recorded_plans

if TYPE_CHECKING:
    import pandas
    import xarray

# -- the result


@dataclass(frozen=True, slots=True)
class Result(events.Result):
    """How a run ended, and what it wrote: `labels`, `table` and `report`."""

    label_name: str = "megaseg"

    @property
    def labels(self) -> "xarray.DataArray":
        """The labels at full resolution, lazily: the image's axes without c, coordinates in µm.

        Raises:
            SettingsError: The run wrote no labels, or several label images.
            SourceError: The target is a plate; open one of its fields with `open_image`.
        """
        from megaseg_dask.lazy import open_image

        tree = open_image(self.target)
        listed = tree["labels"].children if "labels" in tree.children else ()
        written = list(filter(self._is_own, listed))
        if len(written) != 1:
            names = ", ".join(written) or "none"
            raise SettingsError(
                f"{self.target} has several label images of this run, or none ({names}); open one "
                "with megaseg_dask.open_image(target)['labels/NAME/0/image']"
            )
        return tree[f"labels/{written[0]}/0"].dataset["image"]

    @property
    def table(self) -> "pandas.DataFrame":
        """The measurements, one row for each object.

        Raises:
            SettingsError: The run wrote no measurements, or pandas is not installed.
        """
        plan = self._plan()
        if not plan.resolved.measures_objects():
            raise SettingsError(
                f"{self.target} has no measurements; add them to outputs, as in "
                "outputs='labels,scores,measurements'"
            )
        try:
            import pandas
        except ImportError as error:
            raise SettingsError("result.table needs pandas: pip install pandas") from error
        import io

        data = io.BytesIO(plan.table.parent.get(plan.table.basename) or b"")
        if plan.table.basename.endswith(".csv"):
            return pandas.read_csv(data)
        return pandas.read_parquet(data)

    def report(self) -> str:
        """Write the report of the run as one HTML page, and return its path."""
        from megaseg_dask.tools.report.write import write_report

        return str(write_report(self.target, None, self.label_name))

    def _is_own(self, name: str) -> bool:
        """Return whether a label image is of this run; those of several channels have endings."""
        is_named = name == self.label_name or name.startswith(f"{self.label_name}_")
        return is_named and not name.endswith("_mask")

    def _plan(self) -> Plan:
        return recorded_plans(self.target, self.label_name)[0]


# -- segmenting


def segment(
    source: str | Path,
    target: str | Path,
    *,
    model: str | Path | list[str | Path] = "MegaSeg_v1",
    client: Any = None,
    progress: bool | None = None,
    **settings: Any,
) -> Result:
    """Segment the OME-Zarr image or plate ``source`` into ``target``, as ``megaseg segment`` does.

    Of several models the logits are averaged. ``client`` is a Dask client to use instead of
    starting workers. ``progress`` shows progress bars in a notebook; by default they are shown
    there. The result names the tasks that failed, and gives the labels, the table and the report.

    In a script, put the call under ``if __name__ == "__main__":``, because workers import the
    script. This is not needed with ``workers=0``, with a ``client``, or in a notebook.

    Raises:
        MegasegError: The request cannot be carried out.
    """
    parsed = parse_settings({"model": model, **settings})
    emit = _emit_in_notebook(progress)
    result = run_segment(_address(source), str(target), parsed, client=client, emit=emit)
    return _with_data(result, parsed.label_name)


def _with_data(result: events.Result, label_name: str) -> Result:
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return Result(**values, label_name=label_name)


def _address(source: object) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    kind = f"{type(source).__module__}.{type(source).__name__}"
    raise SettingsError(
        f"source: expected the path or address of an OME-Zarr image, found a {kind}; write the "
        "array as OME-Zarr first, for example with ome_zarr.writer.write_image, or call "
        "megaseg_dask.predict, which takes arrays"
    )


with_settings(segment, Settings.model_fields)


# -- labelling again


_OF_RELABEL = (*RESULT, *WORK)


def relabel(
    target: str | Path,
    *,
    label_name: str,
    client: Any = None,
    progress: bool | None = None,
    **settings: Any,
) -> Result:
    """Label again what a run on ``target`` predicted, as ``megaseg relabel`` does; no network runs.

    The labels are written as ``label_name``, beside those of the run. Settings that are not given
    are those of the run; of the outputs, labels alone. ``client`` and ``progress`` are those of
    ``segment``.

    Raises:
        MegasegError: The request cannot be carried out.
    """
    for name in settings:
        if name not in _OF_RELABEL:
            raise SettingsError(f"relabel() does not take {name}{nearest(name, _OF_RELABEL)}")
    parsed = parse_settings({"label_name": label_name, **settings})
    emit = _emit_in_notebook(progress)
    result = run_relabel(str(target), parsed, client=client, emit=emit)
    return _with_data(result, label_name)


with_settings(relabel, _OF_RELABEL, has_defaults=False)

# -- progress in a notebook


def _emit_in_notebook(progress: bool | None) -> Emit:
    """Return what shows events where this process is the kernel of a notebook."""
    # It was imported by the notebook itself.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython and progress is not False else None
    if shell is None or not hasattr(shell, "kernel"):
        return events.ignore
    return _Cell().show


class _Cell:
    """The output of a notebook's cell: a bar for each stage, drawn by the browser itself."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._rows: dict[str, str] = {}
        self._output = display(HTML(""), display_id=True)

    def show(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Step():
                self._rows = {"": f"<tr><td>{event.text}</td></tr>"}
            case Progress():
                self._rows.pop("", None)
                self._rows[event.stage] = _row(event)
            case PatchProgress():
                self._rows[event.stage] = _patches_row(event)
            case events.Result():
                self._rows.pop("", None)
            case _:
                return
        self._output.update(self._html(f"<table>{''.join(self._rows.values())}</table>"))


def _row(event: Progress) -> str:
    words = ", ".join(filter(None, (left_text(event), failed_text(event))))
    return _bar(event.stage, event.n_done, event.n_tasks, f"{event.n_done}/{event.n_tasks}", words)


def _patches_row(event: PatchProgress) -> str:
    words = (patches_text(event), left_text(event))
    return _bar(event.stage, event.n_predicted, event.n_patches, *words)


def _bar(stage: str, n_done: int, n_all: int, *words: str) -> str:
    bar = f'<progress value="{n_done}" max="{n_all}"></progress>'
    cells = (stage_phrase(stage), bar, *words)
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

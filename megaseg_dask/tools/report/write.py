"""One page that says how a run went and what it found: quality control, timings, and the proof at the seams.

The page is one file without scripts and without addresses of other files, so
it can be mailed, archived and opened offline. What it reads is bounded: the
journal, the table of measurements, and samples of the outputs.
"""

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.run.target import ownership
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.page import render

SUFFIX = ".report.html"


def write_report(target: str, out: str | None = None, label_name: str | None = None) -> Location:
    """Write the report of the run on a target, beside it or to ``out``, and return where.

    Raises :class:`TargetError` if no run is recorded there, :class:`SettingsError` if several are and none is named.
    """
    plans = find_plans(target, label_name)
    place = Location.of(out) if out else plans[0].target.sibling(SUFFIX)
    place.parent.put(place.basename, render(plans).encode())
    return place


def find_plans(target: str, label_name: str | None = None) -> list[Plan]:
    """Return the recorded plans of a target, at least one; a plate may have taken several.

    Raises :class:`TargetError` if there is none, :class:`SettingsError` if there are several and none is named.
    """
    where = Location.of(target)
    where.probe(TargetError)
    folder = runs_folder(where)
    # No label name holds a plus; further parts of a plate do.
    names = (
        [label_name]
        if label_name
        else [n for n in folder.children() if (folder / n).is_folder() and "+" not in n]
    )
    plans = {name: found for name in names if (found := ownership.read_parts(where, name))}
    if not plans:
        raise TargetError(
            f"no run is recorded at {folder}{Location.of(target).hint()}; start one with megaseg segment"
        )
    if len(plans) > 1:
        raise SettingsError(f"{where} has runs {', '.join(plans)}; choose one with --label-name")
    return next(iter(plans.values()))

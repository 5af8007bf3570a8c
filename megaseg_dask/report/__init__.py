"""One page that says how a run went and what it found: quality control, timings, and the proof at the seams.

The page is one file without scripts and without addresses of other files, so
it can be mailed, archived and opened offline. What it reads is bounded: the
journal, the table of measurements, and samples of the outputs.
"""

from megaseg_dask import targets
from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.plan import Plan, run_folder, runs_folder
from megaseg_dask.report.page import render
from megaseg_dask.stores import Location

SUFFIX = ".report.html"


def write_report(target: str, out: str | None = None, label_name: str | None = None) -> Location:
    """Write the report of the run on a target, beside it or to ``out``, and return where.

    Raises :class:`TargetError` if no run is recorded there, :class:`SettingsError` if several are and none is named.
    """
    plan = find_plan(target, label_name)
    place = Location.of(out) if out else Location(plan.target).sibling(SUFFIX)
    place.parent.put(place.basename, render(plan).encode())
    return place


def find_plan(target: str, label_name: str | None = None) -> Plan:
    """Return the recorded plan of a target: the only one, or that of a label image.

    Raises :class:`TargetError` if there is none, :class:`SettingsError` if there are several and none is named.
    """
    where = Location.of(target)
    where.probe(TargetError)
    folder = runs_folder(where)
    names = [label_name] if label_name else [n for n in folder.children() if (folder / n).is_folder()]
    plans = {name: plan for name in names if (plan := targets.read_recorded(run_folder(where, name))) is not None}
    if not plans:
        raise TargetError(f"no run is recorded at {folder}; start one with megaseg segment")
    if len(plans) > 1:
        raise SettingsError(f"{where} has runs {', '.join(plans)}; choose one with --label-name")
    return next(iter(plans.values()))

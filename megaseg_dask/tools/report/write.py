"""One HTML file about a run and its result: quality control, timings, and the check of the seams.

The page is one file without scripts and without addresses of other files, so
it can be mailed, archived and opened offline. Reading is bounded: the journal,
the table of measurements, and samples of the outputs.
"""

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.run.workspace import RunFolder
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.page import render

SUFFIX = ".report.html"


def write_report(target: str, out: str | None = None, label_name: str | None = None) -> Location:
    """Write the report of the run on a target, beside it or to ``out``, and return where.

    Raises:
        TargetError: No run is recorded there.
        SettingsError: Several runs are, and none is named.

    """
    plans = find_plans(target, label_name)
    file = Location.of(out) if out else plans[0].target.sibling(SUFFIX)
    file.parent.put(file.basename, render(plans).encode())
    return file


def find_plans(target: str, label_name: str | None = None) -> list[Plan]:
    """Return the recorded plans of a target, at least one; a plate may have several.

    Raises:
        TargetError: No run is recorded there.
        SettingsError: Several runs are, and none is named.

    """
    location = Location.of(target)
    location.probe(TargetError)
    recorded: dict[str, list[Plan]] = {}
    for plan in RunFolder.plans(location, label_name):
        recorded.setdefault(plan.resolved.label_name, []).append(plan)
    if not recorded:
        raise TargetError(
            f"no run is recorded at {runs_folder(location)}{location.hint()}; "
            "start one with megaseg segment"
        )
    if len(recorded) > 1:
        names_text = ", ".join(recorded)
        raise SettingsError(f"{location} has runs {names_text}; choose one with --label-name")
    (plans,) = recorded.values()
    return plans

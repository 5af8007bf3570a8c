"""One HTML file about a run and its result: quality control, timings, and the check of the seams.

The page is one file without scripts and without addresses of other files, so
it can be mailed, archived and opened offline. Reading is bounded: the journal,
the table of measurements, and samples of the outputs.
"""

from megaseg_dask.errors import SettingsError, TargetError
from megaseg_dask.plan.plan import Plan, runs_folder
from megaseg_dask.run.target import ownership
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
    folder = runs_folder(location)
    names = [label_name] if label_name else _label_names(folder)
    plans_by_name = {name: ownership.read_parts(location, name) for name in names}
    recorded = {name: plans for name, plans in plans_by_name.items() if plans}
    if not recorded:
        raise TargetError(
            f"no run is recorded at {folder}{location.hint()}; start one with megaseg segment"
        )
    if len(recorded) > 1:
        names_text = ", ".join(recorded)
        raise SettingsError(f"{location} has runs {names_text}; choose one with --label-name")
    (plans,) = recorded.values()
    return plans


def _label_names(folder: Location) -> list[str]:
    # Further parts of a plate have a plus in their names, which no label name contains.
    return [name for name in folder.children() if (folder / name).is_folder() and "+" not in name]

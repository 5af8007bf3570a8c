"""One HTML file about a run and its result: quality control, timings, and the check of the seams.

The page is one file without scripts and without addresses of other files, so
it can be mailed, archived and opened offline. Reading is bounded: the journal,
the table of measurements, and samples of the outputs.
"""

from megaseg_dask.run.status import find_plans
from megaseg_dask.stores import Location
from megaseg_dask.tools.report.page import render

SUFFIX = ".report.html"


def write_report(target: str, out: str | None = None, label_name: str | None = None) -> Location:
    """Write the report of the run on a target, beside it or to ``out``, and return where.

    The report of labels that were made again has their name.

    Raises:
        TargetError: No run is recorded there, or the page cannot be written.
        SettingsError: Several runs are, and none is named.

    """
    plans = find_plans(target, label_name)
    name = plans[0].table_label
    suffix = f".{name}{SUFFIX}" if name else SUFFIX
    file = Location.of(out) if out else plans[0].target.sibling(suffix)
    # The page takes a while to make.
    file.require_writable()
    file.parent.put(file.basename, render(plans).encode())
    return file

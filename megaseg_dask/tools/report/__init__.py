"""One HTML page that says how a run went: quality control, timings, and the proof at the seams."""

from megaseg_dask.run.status import find_plans
from megaseg_dask.tools.report.write import write_report

__all__ = ["find_plans", "write_report"]

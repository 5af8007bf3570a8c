"""The command line: the only room that prints."""

from megaseg_dask.cli.app import main

__all__ = ["main"]

"""The command line: the only room that prints."""

from megaseg_dask.cli.app import app, main

__all__ = ["app", "main"]

"""``python -m megaseg_dask`` is ``megaseg``."""

from megaseg_dask.cli.app import main

if __name__ == "__main__":
    main()

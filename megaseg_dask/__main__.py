"""``python -m megaseg_dask`` is ``megaseg``."""


def main() -> None:
    """Run the command line and exit with its code."""
    # Not at the top: each worker imports the script that the client was started by.
    from megaseg_dask.cli import main

    main()


if __name__ == "__main__":
    main()

"""``python -m megaseg_dask`` is ``megaseg``."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        # Not at the top: each worker imports the script that the client was started by.
        from megaseg_dask.cli import main

        main()
    except KeyboardInterrupt:
        # No command has begun. One that has begun ends with a message of its own.
        sys.exit(130)


if __name__ == "__main__":
    main()

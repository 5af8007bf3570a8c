"""``make bench``: run the measurements and keep their results; ``--small`` only shows that they run."""

import argparse

from benchmarks import field, gpu, script
from benchmarks.machine import keep

SMALL = (40, 160, 160)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a field of 40×160×160; nothing is kept")
    if parser.parse_args().small:
        print(field.measure(SMALL), script.measure(SMALL), gpu.measure(gpu.TINY))
    else:
        keep("field", field.measure())
        keep("script", script.measure())


if __name__ == "__main__":
    main()

"""``make bench``: run the measurements and keep their results.

``--small`` only shows that they run.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks import field, gpu, io, scale, script, tables, timeline
from benchmarks.machine import keep

SMALL = (40, 160, 160)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--small", action="store_true", help="a field of 40×160×160; nothing is kept"
    )
    if parser.parse_args().small:
        print(field.measure(SMALL), script.measure(SMALL))
        with tempfile.TemporaryDirectory() as folder:
            gpu.Acceptance(Path(folder), gpu.TINY, seconds=280.0).run()
        print(
            io.measure(SMALL, repeats=1),
            timeline.measure(SMALL, n_fields=4, paces=(0.1,))["worker"],
        )
        return
    keep("field", field.measure())
    keep("script", script.measure())
    keep("io", io.measure())
    timeline.keep_both(timeline.measure())
    scale.keep_case("plate", scale.measure_plate())
    tables.fill()


if __name__ == "__main__":
    main()

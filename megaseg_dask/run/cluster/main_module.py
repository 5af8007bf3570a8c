"""The module ``__main__``, which each worker process of this machine imports when it starts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ADVICE = "; in a script, put its calls under `if __name__ == '__main__':`"


@contextmanager
def importable() -> Iterator[None]:
    """Let workers start where ``__main__`` has no file, as a script on standard input.

    multiprocessing would look for a file of the name that Python gives it.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or Path(file).exists():
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = file


def advice() -> str:
    """Return the advice for a script that starts workers when it is imported; empty for others."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if file is None or getattr(main, "__spec__", None) is not None:
        return ""
    with suppress(OSError):
        if "__main__" not in Path(file).read_text(errors="replace"):
            return _ADVICE
    return ""

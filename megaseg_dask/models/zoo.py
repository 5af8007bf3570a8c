"""Where a model's name leads: the starter in the package, or a bundle on disk."""

import importlib.util
from pathlib import Path

from megaseg_dask.errors import BundleError

PUBLISHED = ("MegaSeg_v1", "MegaSeg_light")


def locate(model: str) -> Path:
    """Return the bundle that a name or path means; raises :class:`BundleError` that says how to get it."""
    if model == "starter":
        spec = importlib.util.find_spec("megaseg_dask")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent / "models" / "starter"
    path = Path(model).expanduser()
    if path.exists():
        return path.absolute()
    if model in PUBLISHED:
        raise BundleError(
            f"{model} is not here. Its bundle megaSeg.zip lies in the public bucket "
            "production-aics-ml-segmenter-models (us-west-2): download it and pass its path with --model, "
            "or try --model starter, a small model of this project that ships with it"
        )
    raise BundleError(
        f"--model {model}: neither a known model ({', '.join(PUBLISHED)}, starter) nor a path that exists"
    )

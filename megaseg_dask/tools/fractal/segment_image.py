"""Segment one image of a workflow: the second part of a Fractal task."""

from megaseg_dask.tools.fractal.images import segment_in_place
from megaseg_dask.tools.fractal.script import run


def segment_image(*, zarr_url: str, init_args: dict[str, dict[str, object]]) -> None:
    """Write labels, and a table of their measurements, into one image.

    A job that was stopped goes on where it stopped when it is started again.

    Args:
        zarr_url: The image. (Fractal fills this in.)
        init_args: What was planned. (Fractal fills this in.)
    """
    segment_in_place(zarr_url, init_args["options"])


if __name__ == "__main__":
    run(segment_image)

"""Plan the images of a workflow whose jobs compute on GPUs: the first part of a Fractal task."""

from megaseg_dask.tools.fractal.arguments import with_settings
from megaseg_dask.tools.fractal.images import plan
from megaseg_dask.tools.fractal.script import run


@with_settings
def plan_images_gpu(
    *, zarr_urls: list[str], zarr_dir: str, **options: object
) -> dict[str, list[dict[str, object]]]:
    """Check all images and the model, before any job starts.

    Args:
        zarr_urls: Images to segment. (Fractal fills this in.)
        zarr_dir: Not used: labels are written into the images. (Fractal fills this in.)
        **options: Options of a run, as a form has them.
    """
    return {"parallelization_list": plan(zarr_urls, {**options, "device": "cuda"})}


if __name__ == "__main__":
    run(plan_images_gpu)

"""The tasks of this package, from which ``fractal-manifest create`` makes the manifest."""

from fractal_task_tools.task_models import CompoundTask

from megaseg_dask.tools.fractal.arguments import N_CORES

AUTHORS = "The developers of megaseg-dask"
DOCS_LINK = "https://github.com/megaseg-dask/megaseg_dask/blob/main/docs/workflows.md"

# Megabytes. The one plans; the other runs the network on blocks that fit.
_PLANNING = {"cpus_per_task": 1, "mem": 4000}
_COMPUTING = {"cpus_per_task": N_CORES, "mem": 16000}
_TAGS = ["Deep Learning", "Instance Segmentation", "3D", "MegaSeg"]

TASK_LIST = [
    CompoundTask(
        name="MegaSeg segmentation",
        executable_init="tools/fractal/plan_images.py",
        executable="tools/fractal/segment_image.py",
        meta_init=_PLANNING,
        meta=_COMPUTING,
        category="Segmentation",
        tags=_TAGS,
    ),
    CompoundTask(
        name="MegaSeg segmentation (GPU)",
        executable_init="tools/fractal/plan_images_gpu.py",
        executable="tools/fractal/segment_image.py",
        meta_init=_PLANNING,
        meta={**_COMPUTING, "needs_gpu": True},
        category="Segmentation",
        tags=_TAGS,
    ),
]

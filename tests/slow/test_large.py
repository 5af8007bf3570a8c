"""Promise 7 at size.

Memory of worker, client and scheduler does not grow with the volume or the number of tasks.
"""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.runner import segment
from tests.fixtures.engines import PRELOAD
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def measured(case: str) -> dict[str, Any]:
    """Run one case of the benchmark.

    In a process of its own, since the client's size is one of its figures.
    """
    script = f"import json; from benchmarks.scale import *; print(json.dumps({case}))"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def test_8_gb_through_a_worker_of_2_gb():
    # In float32, half the voxels of an image of 16 bits: what takes time is their number.
    case = "measure_volume((8, 8, 8), '2GB', dtype='float32', patch='32,128,128')"
    found = measured(case)
    assert found["source_gb"] == 8.6
    for stage, peak in found["peak_gb"].items():
        assert peak <= found["projected_gb"][stage] <= 2.0, (stage, found)
    assert found["client_peak_mb"] < 1000


def test_forty_thousand_tasks_leave_client_and_scheduler_as_they_were():
    found = measured("measure_tasks(22, 'labels,scores')")
    assert found["tasks"] > 40_000
    assert found["client_mb"]["peak"] - found["client_mb"]["before"] < 100
    assert found["scheduler_peak_mb"] < 250


def test_shards_of_a_ragged_volume_lose_nothing_to_many_writers(
    tmp_path, tiny_bundle, cheap_engine
):
    import dask
    from distributed import Client, LocalCluster

    from megaseg_dask.run.cluster.dask_config import CONFIG

    source = write_image(tmp_path / "image.zarr", blobs((37, 263, 521)))
    options = {
        "model": str(tiny_bundle),
        "engine": "openvino",
        "threads": 1,
        "overlap": 0,
        "outputs": "labels,scores,mask",
        # Shards of four chunks: the last ones of each axis are cut off.
        "block": "37,256,256",
    }
    settings = parse_settings(options)

    def arrays(target) -> dict[str, np.ndarray]:
        group = zarr.open_group(target, mode="r")
        return {
            path: a[...] for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)
        }

    segment_here(str(source), str(tmp_path / "one.zarr"), settings)
    expected = arrays(tmp_path / "one.zarr")
    written = zarr.open_group(tmp_path / "one.zarr", mode="r")["0"]
    assert (written.chunks, written.shards) == ((37, 128, 128), (37, 256, 256))
    preloads = [*CONFIG["distributed.worker.preload"], PRELOAD]
    with (
        dask.config.set(CONFIG | {"distributed.worker.preload": preloads}),
        LocalCluster(4, threads_per_worker=1, memory_limit=0, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        for repeat in range(20):
            target = tmp_path / f"{repeat}.zarr"
            assert segment(str(source), str(target), settings, client=client).status == "done"
            found = arrays(target)
            for path, values in expected.items():
                assert_array_equal(found[path], values, err_msg=f"repeat {repeat}, {path}")

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
from tests.fixtures.images import blobs, write_image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def measured(case: str) -> dict[str, Any]:
    """Run one case of the benchmark.

    In a process of its own, since the client's size is one of its figures.
    """
    script = f"import json; from benchmarks.scale import *; print(json.dumps({case}))"
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def test_8_gb_through_a_worker_of_2_gb():
    found = measured("measure_volume((16, 8, 8), '2GB')")
    assert found["source_gb"] == 8.6
    for stage, peak in found["peak_gb"].items():
        assert peak <= found["projected_gb"][stage] <= 2.0, (stage, found)
    assert found["client_peak_mb"] < 1000


def test_forty_thousand_tasks_leave_client_and_scheduler_as_they_were():
    found = measured("measure_tasks(22, 'labels,scores')")
    assert found["tasks"] > 40_000
    assert found["client_mb"]["peak"] - found["client_mb"]["before"] < 100
    assert found["scheduler_peak_mb"] < 250


def test_shards_of_a_ragged_volume_lose_nothing_to_many_writers(tmp_path, tiny_bundle):
    import dask
    from distributed import Client, LocalCluster

    from megaseg_dask.run.cluster.dask_config import CONFIG

    source = write_image(tmp_path / "image.zarr", blobs((37, 263, 521)))
    options = {
        "model": str(tiny_bundle),
        "threads": 1,
        "overlap": 0,
        "outputs": "labels,scores,mask",
    }
    # Shards of four chunks: the last ones of each axis are cut off.
    options |= {"block": "37,256,256"}

    def arrays(target) -> dict[str, np.ndarray]:
        group = zarr.open_group(target, mode="r")
        return {
            path: a[...] for path, a in group.members(max_depth=None) if isinstance(a, zarr.Array)
        }

    with dask.config.set(CONFIG):
        with (
            LocalCluster(1, threads_per_worker=1, memory_limit=0, dashboard_address=":0") as one,
            Client(one) as client,
        ):
            segment(str(source), str(tmp_path / "one.zarr"), parse_settings(options), client=client)
        expected = arrays(tmp_path / "one.zarr")
        written = zarr.open_group(tmp_path / "one.zarr", mode="r")["0"]
        assert (written.chunks, written.shards) == ((37, 128, 128), (37, 256, 256))
        with (
            LocalCluster(4, threads_per_worker=1, memory_limit=0, dashboard_address=":0") as four,
            Client(four) as client,
        ):
            for repeat in range(20):
                target = tmp_path / f"{repeat}.zarr"
                segment(str(source), str(target), parse_settings(options), client=client)
                found = arrays(target)
                for path, values in expected.items():
                    assert_array_equal(found[path], values, err_msg=f"repeat {repeat}, {path}")

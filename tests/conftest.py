"""What many tests need: one light bundle, one set of real workers."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.fixtures.bundles import write_checkpoint
from tests.fixtures.faults import Haunted

# Shared machines stall: a clock says nothing about a law.
# In CI the same examples each time: luck must not stop a change. `HYPOTHESIS_PROFILE=attack` looks
# for new ones.
settings.register_profile("megaseg", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("attack", deadline=None, max_examples=2000)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "megaseg")
)

pytest_plugins = ["tests.fixtures.engines", "tests.fixtures.gpus", "tests.fixtures.stores"]

SHARED = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory) -> Path:
    """A folder for all test processes of this session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session", autouse=True)
def _no_models(session_folder):
    """A cache without models, and no network to fetch any from.

    One for the session: a converted network is kept there, and converting takes seconds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGASEG_HOME", str(session_folder / "no-models"))
        patch.setenv("MEGASEG_OFFLINE", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def _power_stays_on():
    """Flush nothing to the disk in this process: no test cuts the power.

    A run flushes its file system several times, and with it all that other tests wrote: most of a
    small run was this wait. `tests/stores/test_local.py` flushes, and `tests/fixtures/disk.py`
    records what is flushed when. Processes that tests start flush as ever.
    """
    from megaseg_dask.stores import local

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(local, "sync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory) -> Path:
    """A checkpoint of a 5-level network small enough for a test, patch 16,32,32, overlap 0.5."""
    return write_checkpoint(tmp_path_factory.mktemp("bundle") / "tiny.ckpt")


@pytest.fixture(scope="session")
def client():
    """A real worker process, shared by the tests of one test process."""
    import dask
    from distributed import Client, LocalCluster

    from megaseg_dask.run.cluster.dask_config import CONFIG

    with dask.config.set(CONFIG):
        cluster = LocalCluster(
            n_workers=1,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        )
        with Client(cluster) as client:
            yield client
        # On a busy machine workers may take longer to end than Dask waits.
        with contextlib.suppress(TimeoutError, OSError):
            cluster.close()


@pytest.fixture
def shared_data() -> Path:
    """Real images kept beside the project, where they are."""
    if not SHARED.exists():
        pytest.skip(f"real images are not at {SHARED}")
    return SHARED


@pytest.fixture
def haunted(tmp_path, monkeypatch) -> Haunted:
    """Let the workers that a run starts do what :class:`Haunted` says."""
    from megaseg_dask.run.cluster import dask_config

    (tmp_path / "haunted").mkdir()
    haunted = Haunted(tmp_path / "haunted")
    monkeypatch.setitem(
        dask_config.CONFIG,
        "distributed.worker.preload",
        [dask_config.WORKER_PRELOAD, haunted.preload],
    )
    return haunted

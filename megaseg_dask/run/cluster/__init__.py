"""Workers of a run: started as the settings say, made ready, looked after, and given back."""

from megaseg_dask.run.cluster.dask_config import CONFIG, WORKER_ENVIRONMENT, WORKER_PRELOAD
from megaseg_dask.run.cluster.workers import Workers, connect

__all__ = ["CONFIG", "WORKER_ENVIRONMENT", "WORKER_PRELOAD", "Workers", "connect"]

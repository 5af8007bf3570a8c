"""Every error that this package raises on purpose.

Each one is also the builtin it refines, and carries the exit code that the
command line ends with: 2 when the request is wrong and nothing was written,
1 when work was lost on the way and the same command resumes.
"""

from typing import ClassVar


class MegasegError(Exception):
    """Something went wrong that the message explains, with the next step."""

    exit_code: ClassVar[int] = 1

    def __reduce__(self) -> tuple[type[Exception], tuple[object, ...]]:
        """Travel between processes as class and message, whatever the builtin's own rule is."""
        return (type(self), self.args)


class SettingsError(MegasegError, ValueError):
    """An option, or a combination of options, that cannot be carried out."""

    exit_code = 2


class SourceError(MegasegError, ValueError):
    """The source is missing, is no OME-Zarr image, or is not one that the model can take."""

    exit_code = 2


class TargetError(MegasegError, FileExistsError):
    """The target is in the way, belongs to another run, or cannot be written."""

    exit_code = 2


class BundleError(MegasegError, ValueError):
    """A model bundle is missing, broken, or of a network that is not ours to run."""

    exit_code = 2


class EngineError(MegasegError, RuntimeError):
    """The machine cannot offer what the plan asks of the inference engine."""


class ClusterError(MegasegError, ConnectionError):
    """The scheduler or all workers were lost on the way; the same command resumes."""


class DataError(MegasegError, ValueError):
    """Voxels that cannot be segmented, such as NaN; the message names where."""


class StoreError(MegasegError, OSError):
    """A store could not be read or written; the message names the URL and the cause."""


class TaskError(MegasegError, RuntimeError):
    """A task of the plan failed; the message names the task and the cause."""

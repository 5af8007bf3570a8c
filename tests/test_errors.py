"""The tree of errors.

Each one refines a builtin, travels between processes and has an exit code.
"""

import pickle

import pytest

from megaseg_dask import errors
from megaseg_dask.errors import MegasegError

CHILDREN = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MegasegError)]
CHILDREN.remove(MegasegError)

# What a message with this class tells a script: 2 the request is wrong and nothing was written, 1
# go on later.
EXIT_CODES = {
    "SettingsError": 2,
    "SourceError": 2,
    "TargetError": 2,
    "BundleError": 2,
    "ClusterError": 1,
    "EngineError": 1,
    "DataError": 1,
    "StoreError": 1,
    "TaskError": 1,
}


def test_every_child_has_its_exit_code():
    assert {c.__name__: c.exit_code for c in CHILDREN} == EXIT_CODES
    assert MegasegError.exit_code == 1


def test_the_module_holds_every_child_of_the_package():
    import megaseg_dask.run.runner  # with it come all modules that could define one  # noqa: F401

    assert set(MegasegError.__subclasses__()) == set(CHILDREN)


@pytest.mark.parametrize("kind", CHILDREN, ids=lambda c: c.__name__)
class TestChild:
    def test_it_is_also_the_builtin_it_refines(self, kind):
        ours, builtin = kind.__bases__
        assert ours is MegasegError
        assert issubclass(builtin, Exception)
        assert builtin.__module__ == "builtins"
        with pytest.raises(builtin, match="the message"):
            raise kind("the message")

    def test_it_travels_between_processes(self, kind):
        copy = pickle.loads(pickle.dumps(kind("cells.zarr: the message")))
        assert type(copy) is kind
        assert str(copy) == "cells.zarr: the message"

    def test_it_is_explained(self, kind):
        assert kind.__doc__

"""All tests of stores have an environment that reaches only their own servers."""

import pytest


@pytest.fixture(autouse=True)
def _environment(store_environment):
    pass


@pytest.fixture
def folder(bucket_folder):
    return bucket_folder

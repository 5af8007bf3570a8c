"""The public API: the names of the package root, each of which can be imported."""

import megaseg_dask


def test_public_names_are_sorted_and_can_be_imported():
    names = megaseg_dask.__all__
    assert names == sorted(names)
    for name in names:
        assert callable(getattr(megaseg_dask, name))


def test_other_names_are_refused():
    assert not hasattr(megaseg_dask, "no_such_name")

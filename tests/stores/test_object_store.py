"""A folder in a bucket, on a store in memory."""

import obstore
import pytest

from megaseg_dask.stores.object_store import BucketFolder
from megaseg_dask.stores.patience import Patience


def test_a_bucket_folder_that_cannot_be_emptied_is_an_error(monkeypatch):
    """As a local one: what stays would be taken for what comes next."""
    store = obstore.store.MemoryStore()
    folder = BucketFolder(store, "run", Patience(0, 0))
    folder.put("plan.json", b"{}")

    def delete(*_):
        raise FileNotFoundError

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "delete", delete)
        with pytest.raises(OSError, match="again and again"):
            folder.remove()
    folder.remove()
    assert not folder.exists()

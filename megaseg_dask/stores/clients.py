"""Clients of object stores and web servers: one per store and process, with bounded waits.

Requests are repeated while a store restarts, for two minutes; a first look is
impatient, because what does not answer then is most likely a wrong address.
"""

import functools
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore.exceptions
from obstore.store import AzureStore, HTTPStore, S3Store

from megaseg_dask.errors import SettingsError
from megaseg_dask.stores.access import StoreOptions
from megaseg_dask.stores.address import S3, WEB, azure_names, scheme_of
from megaseg_dask.stores.environment import azure_config, s3_config
from megaseg_dask.stores.failures import cause_of

Client = S3Store | AzureStore | HTTPStore

# Each piece of a download, and each part of an upload (5 MB, of which 12 may share the line), has read_timeout.
_PATIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "10m"}
_IMPATIENT = {"connect_timeout": "5s", "read_timeout": "10s", "timeout": "10s"}
# Pauses grow slowly by chance, so the time is the bound and not the number.
_RETRIES, _FEW_RETRIES = 1000, 1
_RETRY_S = 120.0
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 10.0

# Storage options that every client knows; the others configure one kind of store.
_CONNECTION = {
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "randomize_addresses",
    "read_timeout",
    "root_certificate",
    "timeout",
    "user_agent",
}
_RETRYING = {"max_retries", "retry_timeout"}


@functools.lru_cache(maxsize=64)
def client_of(root: str, options: StoreOptions, *, anonymous: bool, patient: bool) -> Client:
    """Return the client of a bucket, container or web server.

    Raises :class:`SettingsError` for options that it does not know, or credentials that are nowhere.
    """
    given = options.of_scheme(root)
    connection = {k: v for k, v in given.items() if k in _CONNECTION}
    own = {k: v for k, v in given.items() if k not in _CONNECTION | _RETRYING}
    scheme = scheme_of(root)
    try:
        if scheme in WEB:
            return HTTPStore(root, **_waits(given, connection, root, patient=patient))
        container, account = azure_names(root)
        if scheme == S3:
            config = s3_config(container, own, options.endpoint, anonymous)
        else:
            config = azure_config(container, account, own, options.endpoint, anonymous)
        waits = _waits(given, connection, config.get("endpoint", ""), patient=patient)
        return (S3Store if scheme == S3 else AzureStore)(container, **config, **waits)
    except (obstore.exceptions.BaseError, ValueError, TypeError, OSError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(
            f"{root} cannot be opened: {cause_of(error)}; see --storage-option"
        ) from error


def _waits(
    given: Mapping[str, str], connection: Mapping[str, Any], endpoint: str, *, patient: bool
) -> dict[str, Any]:
    """Return how long to wait for an answer, and for how long to ask again."""
    connection = {**(_PATIENT if patient else _IMPATIENT), **connection}
    if endpoint.startswith("http://"):
        # Else even the endpoint that was asked for is refused, with "builder error".
        connection["allow_http"] = True
    if file := connection.get("root_certificate"):
        connection["root_certificate"] = Path(file).read_text()
    for name in ("connect_timeout", "read_timeout", "timeout"):
        connection[name] = re.sub(r"^(\d+)$", r"\1s", connection[name])
    return {
        "client_options": connection,
        "retry_config": {
            "max_retries": int(given.get("max_retries", _RETRIES)) if patient else _FEW_RETRIES,
            "retry_timeout": timedelta(seconds=float(given.get("retry_timeout", _RETRY_S))),
            "backoff": {
                "init_backoff": timedelta(seconds=_FIRST_BACKOFF_S),
                "max_backoff": timedelta(seconds=_LONGEST_BACKOFF_S),
                "base": 2,
            },
        },
    }

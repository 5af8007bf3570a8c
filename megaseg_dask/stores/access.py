"""How stores are opened: options, and clients that wait a bounded time.

An address holds none of this, so it can be recorded. The options of a process
are set once, by the command or the worker that starts; a location may carry
others.

Requests are repeated while a store restarts, for two minutes. A first look does
not wait: a store that does not answer it most likely has a wrong address.
"""

import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from megaseg_dask.errors import MegasegError, SettingsError
from megaseg_dask.messages import install_command
from megaseg_dask.stores.address import WEB, azure_names, normalize, scheme_of, split
from megaseg_dask.stores.clouds import CLOUDS, Cloud, Config, forget_environment

Client = S3Store | AzureStore | GCSStore | HTTPStore
_SECRET = re.compile(r"secret|token|password|sas_key|account_key|access_key$", re.IGNORECASE)
# Shorter values are words of ordinary messages.
_MIN_SECRET = 6


# -- options


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """The options ``--endpoint``, ``--anon`` and ``--storage-option``.

    ``options`` may name their scheme, as in ``s3.region``, and may hold secrets:
    no ``repr`` shows them. ``anonymous`` holds at and below the address
    ``anonymous_under``, or everywhere if that is ``None``. ``retries`` is how often
    a failed request is made again (:mod:`megaseg_dask.stores.patience`).
    """

    endpoint: str | None = None
    anonymous: bool = False
    anonymous_under: str | None = None
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    retries: int = 3

    def __post_init__(self) -> None:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise SettingsError(
                f"--endpoint {self.endpoint}: expected a URL such as https://minio.example.org:9000"
            )

    @classmethod
    def parse(
        cls,
        endpoint: str | None = None,
        anon: bool = False,
        storage_options: Iterable[str] = (),
        source: str | None = None,
        retries: int = 3,
    ) -> "StoreOptions":
        """Return the options of a command line; ``anon`` is for data at and below ``source`` alone.

        Raises:
            SettingsError: A storage option is not ``KEY=VALUE``, or the endpoint is no URL.
        """
        pairs = []
        for number, text in enumerate(storage_options, start=1):
            key, _, value = text.partition("=")
            if "=" not in text or not key.strip():
                # The text is not shown: it may be a secret without its key.
                raise SettingsError(
                    f"--storage-option {number}: expected KEY=VALUE, such as region=us-west-2"
                )
            pairs.append((key.strip(), value.strip()))
        if endpoint is not None:
            endpoint = endpoint.rstrip("/") or None
        under = normalize(source) if anon and source is not None else None
        return cls(endpoint, anon, under, tuple(pairs), retries)

    def is_anonymous(self, url: str) -> bool:
        """Return whether an address is read without credentials."""
        if not self.anonymous or self.anonymous_under is None:
            return self.anonymous
        below = self.anonymous_under.rstrip("/") + "/"
        return url == self.anonymous_under or url.startswith(below)

    def wait_s(self, url: str, *, patient: bool) -> float:
        """Return the seconds for which requests to the store of an address are made again."""
        if not patient:
            return _RETRY_IMPATIENT_S
        return float(self.for_scheme(url).get("retry_timeout", _RETRY_S))

    def for_scheme(self, url: str) -> dict[str, str]:
        """Return the options for the store of an address: for all stores, and for its scheme."""
        chosen = {}
        for key, value in self.options:
            scheme, dot, name = key.partition(".")
            if not dot:
                chosen[key] = value
            elif scheme == scheme_of(url):
                chosen[name] = value
        return chosen


@dataclass(slots=True)
class _Process:
    """How this process opens the stores of locations that carry no options."""

    options: StoreOptions = field(default_factory=StoreOptions)
    waits: bool = True


_process = _Process()


def configure(options: StoreOptions) -> None:
    """Set how this process opens stores, and wait for them again."""
    _process.options = options
    _process.waits = True


def process_options() -> StoreOptions:
    """Return how this process opens stores."""
    return _process.options


def stop_waiting() -> None:
    """Ask stores only once from now on: one did not answer, and few requests are left to make."""
    _process.waits = False


def waits_for_stores() -> bool:
    """Return whether this process repeats requests to a store that does not answer."""
    return _process.waits


def secrets() -> list[str]:
    """Return the values that no message may show: options and variables with a secret's name."""
    named = [*_process.options.options, *os.environ.items()]
    return [value for name, value in named if len(value) >= _MIN_SECRET and _SECRET.search(name)]


def is_secret(option: str) -> bool:
    """Return whether an option of a store, ``KEY=VALUE``, has a secret's name."""
    key, _, _ = option.partition("=")
    return bool(_SECRET.search(key))


# -- clients

# Each piece of a download has read_timeout, and each part of an upload: 5 MB, up to 12 at a time.
_PATIENT = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "10m"}
_IMPATIENT = {"connect_timeout": "5s", "read_timeout": "10s", "timeout": "10s"}
# Pauses grow by chance, so the time is the bound, and not the number of retries.
_MAX_RETRIES = 1000
_MAX_RETRIES_IMPATIENT = 1
_RETRY_S = 120.0
# Long enough for an answer that is spoilt, and too short for one that does not come.
_RETRY_IMPATIENT_S = 2.0
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0

# Storage options of every client; all others configure one kind of store.
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


def open_client(url: str, options: StoreOptions, *, patient: bool) -> Client:
    """Return the client of the bucket, container or web server that holds an address.

    Raises:
        SettingsError: An option is unknown, or there are no credentials.
    """
    root, _ = split(url)
    return client_of(root, options, anonymous=options.is_anonymous(url), patient=patient)


@functools.lru_cache(maxsize=64)
def client_of(root: str, options: StoreOptions, *, anonymous: bool, patient: bool) -> Client:
    """Return the client of a bucket, container or web server, one per process.

    Raises:
        SettingsError: An option is unknown, or there are no credentials.
    """
    try:
        return _make_client(root, options, anonymous=anonymous, patient=patient)
    except MegasegError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise SettingsError(f"{root} cannot be opened: {reason}; see --storage-option") from error


def _make_client(root: str, options: StoreOptions, *, anonymous: bool, patient: bool) -> Client:
    given = options.for_scheme(root)
    scheme = scheme_of(root)
    if scheme in WEB:
        return HTTPStore(root, **_waiting(given, root, patient=patient))
    own = {key: value for key, value in given.items() if key not in _CONNECTION | _RETRYING}
    config = cloud_config(root, own, options.endpoint, anonymous=anonymous)
    cloud = CLOUDS[scheme]
    waiting = _waiting(given, config.get(cloud.endpoint_option, ""), patient=patient)
    bucket, _ = azure_names(root)
    return cloud.client(bucket, **config, **waiting)


def cloud_config(
    root: str, given: Mapping[str, str], endpoint: str | None, *, anonymous: bool
) -> Config:
    """Return the settings of the client of a bucket or container, its login among them.

    Raises:
        SettingsError: There are no credentials, or a setting is missing or cannot be read.
    """
    cloud = CLOUDS[scheme_of(root)]
    config = cloud.configure(root, given, endpoint)
    if anonymous:
        config["skip_signature"] = True
    elif not cloud.states_credentials(config):
        config["credential_provider"] = _log_in(root, cloud)
    return config


def _log_in(root: str, cloud: Cloud) -> Any:
    """Return a provider of credentials that has provided some."""
    nothing = f"{root}: no credentials were found"
    variables = f"set {cloud.usual_variables}"
    public = "or pass --anon if the data are public"
    try:
        provider = cloud.make_provider()
        if provider is not None:
            provider()
    except ImportError as error:
        install = f"{install_command(cloud.extra)} to use other logins"
        raise SettingsError(f"{nothing}; {variables}, {install}, {public}") from error
    except MegasegError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise SettingsError(f"{nothing}: {reason}; log in again, {variables}, {public}") from error
    if provider is None:
        raise SettingsError(f"{nothing}; {variables}, {public}")
    return provider


def _waiting(given: Mapping[str, str], endpoint: str, *, patient: bool) -> Config:
    """Return how long a client waits for an answer, and for how long it asks again."""
    connection: Config = dict(_PATIENT if patient else _IMPATIENT)
    connection |= {key: value for key, value in given.items() if key in _CONNECTION}
    if endpoint.startswith("http://"):
        # A client refuses plain HTTP otherwise, with the words "builder error".
        connection["allow_http"] = True
    if "root_certificate" in connection:
        connection["root_certificate"] = Path(connection["root_certificate"]).read_text()
    for name in _PATIENT:
        # A number without a unit means seconds.
        connection[name] = re.sub(r"^(\d+)$", r"\1s", connection[name])
    max_retries = _MAX_RETRIES_IMPATIENT
    if patient:
        max_retries = int(given.get("max_retries", _MAX_RETRIES))
    return {
        "client_options": connection,
        "retry_config": {
            "max_retries": max_retries,
            "retry_timeout": timedelta(seconds=float(given.get("retry_timeout", _RETRY_S))),
            "backoff": {
                "init_backoff": timedelta(seconds=_FIRST_BACKOFF_S),
                "max_backoff": timedelta(seconds=_MAX_BACKOFF_S),
                "base": 2,
            },
        },
    }


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without secrets."""
    line = str(error).partition("\n")[0].strip()
    return without_secrets(line or type(error).__name__)


def without_secrets(text: str) -> str:
    """Return a text with all known secrets blanked out."""
    for secret in secrets():
        text = text.replace(secret, "***")
    return text


def forget_clients() -> None:
    """Forget opened clients, and what was read of the environment for them."""
    client_of.cache_clear()
    forget_environment()

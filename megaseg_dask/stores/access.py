"""How stores are opened: options, credentials, and clients that wait a bounded time.

An address holds none of this, so it can be recorded. The options of a process
are set once, by the command or the worker that starts; a location may carry
others. Credentials that options or variables state are read by the clients.
Every other way to log in (profiles, single sign-on, assumed roles, the identity
of a machine) is left to the library of the cloud's vendor.

Requests are repeated while a store restarts, for two minutes. A first look does
not wait: a store that does not answer it most likely has a wrong address.
"""

import functools
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from os import environ
from pathlib import Path
from typing import Any

from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from megaseg_dask.errors import MegasegError, SettingsError
from megaseg_dask.stores.address import (
    AZURE,
    GOOGLE,
    S3,
    WEB,
    azure_names,
    normalize,
    scheme_of,
    split,
)

Client = S3Store | AzureStore | GCSStore | HTTPStore
# What a client is made with: texts, and the provider of its credentials.
Config = dict[str, Any]

VARIABLES = {
    S3: "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    AZURE: "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    GOOGLE: "GOOGLE_APPLICATION_CREDENTIALS",
}

_SECRET = re.compile(r"secret|token|password|sas_key|account_key|access_key$", re.IGNORECASE)
# Shorter values are words of ordinary messages.
_MIN_SECRET = 6


# -- options


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """The options ``--endpoint``, ``--anon`` and ``--storage-option``.

    ``options`` may name their scheme, as in ``s3.region``, and may hold secrets:
    no ``repr`` shows them. ``anonymous`` holds at and below the address
    ``anonymous_under``, or everywhere if that is ``None``.
    """

    endpoint: str | None = None
    anonymous: bool = False
    anonymous_under: str | None = None
    options: tuple[tuple[str, str], ...] = field(default=(), repr=False)

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
        return cls(endpoint, anon, under, tuple(pairs))

    def is_anonymous(self, url: str) -> bool:
        """Return whether an address is read without credentials."""
        if not self.anonymous or self.anonymous_under is None:
            return self.anonymous
        below = self.anonymous_under.rstrip("/") + "/"
        return url == self.anonymous_under or url.startswith(below)

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
    bucket, account = azure_names(root)
    if scheme == S3:
        config = s3_config(bucket, own, options.endpoint, anonymous=anonymous)
        waiting = _waiting(given, config.get("endpoint", ""), patient=patient)
        return S3Store(bucket, **config, **waiting)
    if scheme == AZURE:
        config = azure_config(bucket, account, own, options.endpoint, anonymous=anonymous)
        waiting = _waiting(given, config.get("endpoint", ""), patient=patient)
        return AzureStore(bucket, **config, **waiting)
    config = google_config(bucket, own, options.endpoint, anonymous=anonymous)
    waiting = _waiting(given, config.get("base_url", ""), patient=patient)
    return GCSStore(bucket, **config, **waiting)


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


# -- credentials and endpoints

_DEFAULT_REGION = "us-east-1"
_REGION_TIMEOUT_S = 5.0
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"

# Options and variables that state credentials, which the clients read by themselves.
_S3_OPTIONS = {"access_key_id", "skip_signature"}
_S3_STATED = ("AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE")
_AZURE_OPTIONS = {
    "account_key",
    "sas_key",
    "token",
    "client_id",
    "skip_signature",
    "use_azure_cli",
}
_AZURE_STATED = re.compile(
    "AZURE_(STORAGE_)?(ACCOUNT_KEY|ACCESS_KEY|MASTER_KEY|SAS_KEY|SAS_TOKEN|TOKEN|CLIENT_ID|"
    "FEDERATED_TOKEN_FILE|USE_AZURE_CLI|MSI_ENDPOINT|IDENTITY_ENDPOINT|SKIP_SIGNATURE|USE_EMULATOR)"
)
_GOOGLE_OPTIONS = {
    "application_credentials",
    "bearer_token",
    "service_account",
    "service_account_key",
    "skip_signature",
}
_GOOGLE_STATED = (
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SKIP_SIGNATURE",
)
# Settings of an AWS profile that lead to credentials.
_AWS_LOGINS = {
    "aws_access_key_id",
    "credential_process",
    "login_session",
    "role_arn",
    "sso_session",
    "sso_start_url",
    "web_identity_token_file",
}
_CONNECTION_STRING = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "BlobEndpoint": "endpoint",
    "SharedAccessSignature": "sas_key",
}


def s3_config(
    bucket: str, given: Mapping[str, str], endpoint: str | None, *, anonymous: bool
) -> Config:
    """Return the configuration of an S3 bucket's client.

    Raises:
        SettingsError: There are no credentials, or the AWS profile cannot be read.
    """
    config: Config = dict(given)
    endpoint = endpoint or config.get("endpoint") or _aws_endpoint()
    if endpoint:
        config["endpoint"] = endpoint
        # Under both names: the variable of the second would win over the first.
        config["aws_endpoint_url_s3"] = endpoint
    region = config.get("region") or environ.get("AWS_REGION") or _aws_profile_region()
    if not region and not endpoint:
        region = _region_of(bucket)
    config["region"] = region or _DEFAULT_REGION
    if anonymous:
        config["skip_signature"] = True
    elif not (_S3_OPTIONS & set(config) or any(map(environ.get, _S3_STATED))):
        config["credential_provider"] = _log_in(f"s3://{bucket}", _aws_provider)
    return config


def azure_config(
    container: str,
    account: str | None,
    given: Mapping[str, str],
    endpoint: str | None,
    *,
    anonymous: bool,
) -> Config:
    """Return the configuration of an Azure container's client.

    Raises:
        SettingsError: No account is named, or there are no credentials.
    """
    config: Config = {**_connection_string(), **given}
    if endpoint:
        config["endpoint"] = endpoint
    if account:
        config["account_name"] = account
    if not (config.get("account_name") or environ.get("AZURE_STORAGE_ACCOUNT_NAME")):
        raise SettingsError(
            f"az://{container}: set AZURE_STORAGE_ACCOUNT_NAME to the storage account that holds it"
        )
    if anonymous:
        config["skip_signature"] = True
    elif not (_AZURE_OPTIONS & set(config) or any(map(_AZURE_STATED.fullmatch, environ))):
        config["credential_provider"] = _log_in(f"az://{container}", _azure_provider)
    return config


def google_config(
    bucket: str, given: Mapping[str, str], endpoint: str | None, *, anonymous: bool
) -> Config:
    """Return the configuration of a Google bucket's client.

    Raises:
        SettingsError: There are no credentials.
    """
    config: Config = dict(given)
    if endpoint:
        config["base_url"] = endpoint
    if anonymous:
        config["skip_signature"] = True
    elif not (_GOOGLE_OPTIONS & set(config) or any(map(environ.get, _GOOGLE_STATED))):
        config["credential_provider"] = _log_in(f"gs://{bucket}", _google_provider)
    return config


def has_credentials(scheme: str) -> bool:
    """Return whether variables or the AWS profile state credentials; no network is asked.

    Raises:
        SettingsError: The AWS profile cannot be read.
    """
    if scheme == S3:
        if any(map(environ.get, _S3_STATED)):
            return True
        return bool(_AWS_LOGINS & set(_aws_session().get_scoped_config()))
    if scheme == AZURE:
        return any(map(_AZURE_STATED.fullmatch, environ)) or bool(_connection_string())
    return False


def _log_in(root: str, make_provider: Callable[[], Any]) -> Any:
    """Return a provider of credentials that has provided some."""
    variables = VARIABLES[scheme_of(root)]
    public = "or pass --anon if the data are public"
    try:
        provider = make_provider()
        if provider is not None:
            provider()
            return provider
    except ImportError as error:
        extra = {AZURE: "azure", GOOGLE: "gcs"}[scheme_of(root)]
        raise SettingsError(
            f"{root}: no credentials were found; set {variables}, "
            f"pip install 'megaseg-dask[{extra}]' for other ways to log in, {public}"
        ) from error
    except MegasegError:
        raise
    except Exception as error:
        raise SettingsError(
            f"{root}: no credentials were found: {first_line(error)}; "
            f"log in again, set {variables}, {public}"
        ) from error
    raise SettingsError(f"{root}: no credentials were found; set {variables}, {public}")


# Each of these libraries is imported only where nothing else states credentials.


def _aws_provider() -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = _aws_session()
    if session.get_credentials() is None:
        return None
    return Boto3CredentialProvider(session)


def _azure_provider() -> Any:
    from obstore.auth.azure import AzureCredentialProvider

    return AzureCredentialProvider()


def _google_provider() -> Any:
    import google.auth
    from obstore.auth.google import GoogleCredentialProvider

    # By itself the provider asks for no scope, and keys of service accounts need one.
    credentials, _ = google.auth.default(scopes=[_GOOGLE_SCOPE])
    return GoogleCredentialProvider(credentials)


@functools.lru_cache(maxsize=1)
def _aws_session() -> Any:
    """Return botocore's session, which knows the files of the AWS command line."""
    import botocore.exceptions
    import botocore.session

    session = botocore.session.Session()
    try:
        session.get_scoped_config()
    except botocore.exceptions.BotoCoreError as error:
        raise SettingsError(f"{error}; check AWS_PROFILE and the files in ~/.aws") from error
    return session


def _aws_profile_region() -> str | None:
    region: str | None = _aws_session().get_config_variable("region")
    return region


def _aws_endpoint() -> str | None:
    stated = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    if stated:
        return stated
    from botocore.configprovider import ConfiguredEndpointProvider

    session = _aws_session()
    endpoint: str | None = ConfiguredEndpointProvider(
        full_config=session.full_config,
        scoped_config=session.get_scoped_config(),
        client_name="s3",
    ).provide()
    return endpoint


@functools.lru_cache(maxsize=64)
def _region_of(bucket: str) -> str | None:
    """Return the region of a bucket, which AWS tells everyone: requests to another one fail."""
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_REGION_TIMEOUT_S) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
    except OSError:
        return None
    region: str | None = headers.get("x-amz-bucket-region")
    return region


def _connection_string() -> dict[str, str]:
    """Return the parts of Azure's connection string, by the client's names."""
    config = {}
    for part in environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"):
        name, _, value = part.partition("=")
        if name in _CONNECTION_STRING:
            config[_CONNECTION_STRING[name]] = value
    return config


def forget_clients() -> None:
    """Forget opened clients, and what was read of the environment for them."""
    client_of.cache_clear()
    _aws_session.cache_clear()
    _region_of.cache_clear()

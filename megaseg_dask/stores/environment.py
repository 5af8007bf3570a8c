"""What the usual environment says of a store: endpoint, region and credentials, where other tools look for them.

Most variables are read by the clients themselves; here is what they do not
know: ``~/.aws``, connection strings, the region of a bucket, and that there are
no credentials at all, which they would look for in the network.
"""

import configparser
import functools
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from os import environ
from pathlib import Path
from typing import Any

from megaseg_dask.errors import SettingsError
from megaseg_dask.stores.address import AZURE, S3

_METADATA_SERVICE = ("169.254.169.254", 80)
_METADATA_S = 1.0
_REGION_S = 5.0
_DEFAULT_REGION = "us-east-1"

# Any of these names credentials of S3 that the client finds by itself.
_S3_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
    "AWS_METADATA_ENDPOINT",
)
_AZURE_CREDENTIALS = re.compile(
    "AZURE_(STORAGE_)?(ACCOUNT_KEY|ACCESS_KEY|MASTER_KEY|SAS_KEY|SAS_TOKEN|TOKEN|CLIENT_ID|FEDERATED_TOKEN_FILE|"
    "USE_AZURE_CLI|MSI_ENDPOINT|IDENTITY_ENDPOINT|SKIP_SIGNATURE|USE_EMULATOR)"
)


def s3_config(
    bucket: str, given: Mapping[str, Any], endpoint: str | None, anonymous: bool
) -> dict[str, Any]:
    """Return the configuration of a bucket's client.

    Raises :class:`SettingsError` if there are no credentials to be found.
    """
    profile = _profile()
    config: dict[str, Any] = dict(given)
    endpoint = endpoint or _first(
        config.get("endpoint"),
        environ.get("AWS_ENDPOINT_URL_S3"),
        environ.get("AWS_ENDPOINT_URL"),
        profile.get("endpoint_url"),
    )
    if endpoint:
        # Under both names: of the variables, the second would win over the first.
        config |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
    config["region"] = (
        _first(
            config.get("region"),
            environ.get("AWS_REGION"),
            environ.get("AWS_DEFAULT_REGION"),
            profile.get("region"),
        )
        or (None if endpoint else _region_of(bucket))
        or _DEFAULT_REGION
    )
    if anonymous:
        config["skip_signature"] = True
    elif not (
        any(map(environ.get, _S3_CREDENTIALS)) or {"access_key_id", "skip_signature"} & set(config)
    ):
        config |= _profile_keys(profile) or _require_machine_credentials(
            f"s3://{bucket}", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    return config


def azure_config(
    container: str,
    account: str | None,
    given: Mapping[str, Any],
    endpoint: str | None,
    anonymous: bool,
) -> dict[str, Any]:
    """Return the configuration of a container's client.

    Raises :class:`SettingsError` if no account is named, or there are no credentials to be found.
    """
    config: dict[str, Any] = {**_connection_string(), **given}
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
    elif not (
        set(config)
        & {"account_key", "sas_key", "token", "client_id", "skip_signature", "use_azure_cli"}
        or any(map(_AZURE_CREDENTIALS.fullmatch, environ))
    ):
        _require_machine_credentials(
            f"az://{container}", "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
        )
    return config


def has_credentials(scheme: str) -> bool:
    """Tell whether the environment or the files of the AWS command line hold credentials; asks no network."""
    if scheme == S3:
        return any(map(environ.get, _S3_CREDENTIALS)) or "aws_access_key_id" in _profile()
    return scheme == AZURE and (
        any(map(_AZURE_CREDENTIALS.fullmatch, environ)) or bool(_connection_string())
    )


def _first(*values: str | None) -> str | None:
    return next((value for value in values if value), None)


def _profile() -> dict[str, str]:
    """Return what the files of the AWS command line say of the profile in use."""
    name = environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "~/.aws/config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials", name),
    ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(environ.get(variable, file)).expanduser())
        except (OSError, configparser.Error, RuntimeError):
            continue
        if parser.has_section(section):
            found |= dict(parser[section])
    return found


def _profile_keys(profile: Mapping[str, str]) -> dict[str, str]:
    names = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
    }
    keys = {ours: profile[theirs] for theirs, ours in names.items() if theirs in profile}
    if not keys and {"sso_session", "sso_start_url", "role_arn", "credential_process"} & set(
        profile
    ):
        raise SettingsError(
            "the AWS profile in use logs in through another service; put its keys into the environment with "
            '`eval "$(aws configure export-credentials --format env)"`'
        )
    return keys


def _require_machine_credentials(root: str, variables: str) -> dict[str, str]:
    """Raise unless this is a virtual machine in a cloud, which gives credentials by itself."""
    disabled = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
    try:
        if not disabled:
            socket.create_connection(_METADATA_SERVICE, _METADATA_S).close()
            return {}
    except OSError:
        pass
    raise SettingsError(
        f"{root}: no credentials were found; set {variables}, or pass --anon if the data are public"
    )


@functools.lru_cache(maxsize=64)
def _region_of(bucket: str) -> str | None:
    """Ask AWS, which tells anybody, in which region a bucket is: requests to another one fail."""
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_REGION_S) as answer:
            found: str | None = answer.headers.get("x-amz-bucket-region")
    except urllib.error.HTTPError as error:
        found = error.headers.get("x-amz-bucket-region")
    except OSError:
        found = None
    return found


def _connection_string() -> dict[str, str]:
    """Return what a connection string of Azure says, in the client's own names."""
    parts = environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";")
    pairs = dict(part.split("=", 1) for part in parts if "=" in part)
    names = {
        "AccountName": "account_name",
        "AccountKey": "account_key",
        "BlobEndpoint": "endpoint",
        "SharedAccessSignature": "sas_key",
    }
    return {ours: pairs[theirs] for theirs, ours in names.items() if theirs in pairs}

"""What differs between S3, Azure and Google: their settings, and how one logs in.

Credentials that options or variables state are read by the clients. Every other
way to log in (profiles, single sign-on, assumed roles, the identity of a machine)
is left to the vendor's own library, which is imported only where it is needed.
"""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import environ
from typing import Any

from obstore.store import AzureStore, GCSStore, S3Store

from megaseg_dask.errors import SettingsError
from megaseg_dask.stores.address import AZURE, GOOGLE, S3, azure_names

# What a client is made with: texts, and the provider of its credentials.
Config = dict[str, Any]

_DEFAULT_REGION = "us-east-1"
_REGION_TIMEOUT_S = 5.0
_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"

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
# Parts of Azure's connection string, by the client's names.
_CONNECTION_STRING = {
    "AccountName": "account_name",
    "AccountKey": "account_key",
    "BlobEndpoint": "endpoint",
    "SharedAccessSignature": "sas_key",
}


@dataclass(frozen=True, slots=True)
class Cloud:
    """One kind of object store.

    ``configure`` takes the root of an address, the options given for it and an
    endpoint. ``make_provider`` returns the vendor's provider of credentials, or
    ``None``; it raises :class:`ImportError` unless ``extra`` is installed.
    """

    client: type[S3Store] | type[AzureStore] | type[GCSStore]
    endpoint_option: str
    configure: Callable[[str, Mapping[str, str], str | None], Config]
    # Options and variables that state credentials.
    credential_options: re.Pattern[str]
    credential_variables: re.Pattern[str]
    make_provider: Callable[[], Any]
    extra: str
    # For messages.
    usual_variables: str

    def states_credentials(self, config: Config) -> bool:
        """Return whether a configuration or the environment states credentials."""
        if any(map(self.credential_options.fullmatch, config)):
            return True
        variables = [name for name, value in environ.items() if value]
        return any(map(self.credential_variables.fullmatch, variables))


def has_credentials(scheme: str) -> bool:
    """Return whether variables or the AWS profile state credentials; no network is asked.

    Raises:
        SettingsError: The AWS profile cannot be read.
    """
    if scheme not in CLOUDS:
        return False
    if scheme == S3 and _AWS_LOGINS & set(_aws_session().get_scoped_config()):
        return True
    config = _connection_string() if scheme == AZURE else {}
    return CLOUDS[scheme].states_credentials(config)


def forget_environment() -> None:
    """Forget what was read of the files of AWS, and of the regions of buckets."""
    _aws_session.cache_clear()
    _region_of.cache_clear()


# -- S3


def _configure_s3(root: str, given: Mapping[str, str], endpoint: str | None) -> Config:
    config: Config = dict(given)
    endpoint = endpoint or config.get("endpoint") or _aws_endpoint()
    if endpoint:
        config["endpoint"] = endpoint
        # Under both names: the variable of the second would win over the first.
        config["aws_endpoint_url_s3"] = endpoint
    region = config.get("region") or environ.get("AWS_REGION") or _aws_region()
    if not region and not endpoint:
        region = _region_of(root.removeprefix(f"{S3}://"))
    config["region"] = region or _DEFAULT_REGION
    return config


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


def _aws_region() -> str | None:
    region: str | None = _aws_session().get_config_variable("region")
    return region


@functools.lru_cache(maxsize=64)
def _region_of(bucket: str) -> str | None:
    """Return the region of a bucket, which AWS tells everyone: requests to another one fail."""
    # A tenth of the start-up of a small command, and only public buckets ask for it.
    import urllib.error
    import urllib.request

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


def _aws_provider() -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider

    session = _aws_session()
    if session.get_credentials() is None:
        return None
    return Boto3CredentialProvider(session)


# -- Azure


def _configure_azure(root: str, given: Mapping[str, str], endpoint: str | None) -> Config:
    config: Config = {**_connection_string(), **given}
    if endpoint:
        config["endpoint"] = endpoint
    container, account = azure_names(root)
    if account:
        config["account_name"] = account
    if not (config.get("account_name") or environ.get("AZURE_STORAGE_ACCOUNT_NAME")):
        raise SettingsError(
            f"az://{container}: set AZURE_STORAGE_ACCOUNT_NAME to the storage account that holds it"
        )
    return config


def _connection_string() -> dict[str, str]:
    config = {}
    for part in environ.get("AZURE_STORAGE_CONNECTION_STRING", "").split(";"):
        name, _, value = part.partition("=")
        if name in _CONNECTION_STRING:
            config[_CONNECTION_STRING[name]] = value
    return config


def _azure_provider() -> Any:
    from obstore.auth.azure import AzureCredentialProvider

    return AzureCredentialProvider()


# -- Google


def _configure_google(_root: str, given: Mapping[str, str], endpoint: str | None) -> Config:
    config: Config = dict(given)
    if endpoint:
        config["base_url"] = endpoint
    return config


def _google_provider() -> Any:
    import google.auth
    from obstore.auth.google import GoogleCredentialProvider

    # By itself the provider asks for no scope, and keys of service accounts need one.
    credentials, _ = google.auth.default(scopes=[_GOOGLE_SCOPE])
    return GoogleCredentialProvider(credentials)


CLOUDS = {
    S3: Cloud(
        client=S3Store,
        endpoint_option="endpoint",
        configure=_configure_s3,
        credential_options=re.compile("access_key_id|skip_signature"),
        credential_variables=re.compile("AWS_(ACCESS_KEY_ID|SKIP_SIGNATURE)"),
        make_provider=_aws_provider,
        extra="",
        usual_variables="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    AZURE: Cloud(
        client=AzureStore,
        endpoint_option="endpoint",
        configure=_configure_azure,
        credential_options=re.compile(
            "account_key|sas_key|token|client_id|skip_signature|use_azure_cli"
        ),
        credential_variables=re.compile(
            "AZURE_(STORAGE_)?(ACCOUNT_KEY|ACCESS_KEY|MASTER_KEY|SAS_KEY|SAS_TOKEN|TOKEN|"
            "CLIENT_ID|FEDERATED_TOKEN_FILE|USE_AZURE_CLI|MSI_ENDPOINT|IDENTITY_ENDPOINT|"
            "SKIP_SIGNATURE|USE_EMULATOR)"
        ),
        make_provider=_azure_provider,
        extra="azure",
        usual_variables="AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    ),
    GOOGLE: Cloud(
        client=GCSStore,
        endpoint_option="base_url",
        configure=_configure_google,
        credential_options=re.compile(
            "application_credentials|bearer_token|service_account(_key)?|skip_signature"
        ),
        credential_variables=re.compile(
            "GOOGLE_(BEARER_TOKEN|SERVICE_ACCOUNT(_KEY|_PATH)?|SKIP_SIGNATURE)"
        ),
        make_provider=_google_provider,
        extra="gcs",
        usual_variables="GOOGLE_APPLICATION_CREDENTIALS",
    ),
}

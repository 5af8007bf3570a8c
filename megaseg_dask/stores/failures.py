"""What went wrong with a store, in one line: the place, the cause and the next step.

Clients of stores tell little by the type of an error and much in its text,
over many lines. This is the one place that reads those texts.
"""

import io
import re
from dataclasses import dataclass

import obstore.exceptions

from megaseg_dask.errors import MegasegError
from megaseg_dask.stores import access
from megaseg_dask.stores.address import AZURE, GOOGLE, LOCAL, S3, WEB, scheme_of

# What fsspec's file systems raise comes from the libraries below them.
_CLIENT_LIBRARIES = {
    "adlfs",
    "aiobotocore",
    "aiohttp",
    "azure",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "paramiko",
    "requests",
    "s3fs",
    "smbprotocol",
    "urllib3",
}

# What a store answers: by its code, which S3 and Azure send, or by the status of HTTP.
_ANSWERS: list[tuple[str, str, set[str], set[int]]] = [
    ("bucket", "there is no such bucket", {"NoSuchBucket", "ContainerNotFound"}, set()),
    ("key", "the store does not know the access key", {"InvalidAccessKeyId"}, set()),
    (
        "key",
        "the secret does not fit the access key",
        {"SignatureDoesNotMatch", "AuthenticationFailed"},
        set(),
    ),
    (
        "key",
        "the credentials have expired",
        {"ExpiredToken", "TokenRefreshRequired", "RequestExpired"},
        set(),
    ),
    (
        "region",
        "the bucket is in another region",
        {"PermanentRedirect", "AuthorizationHeaderMalformed"},
        {301, 307},
    ),
    ("denied", "access denied", {"AccessDenied", "AuthorizationFailure"}, {401, 403}),
    ("busy", "the store is too busy", {"SlowDown", "ServerBusy"}, {429, 503}),
]
# Where it answered nothing: by the words of the client.
_SILENCE = [
    ("key", "the secret is not one", r"Invalid Access Key"),
    ("credentials", "no credentials were found", r"DefaultCredentialsError|NoCredentials"),
    ("region", "the bucket is in another region", r"redirect without LOCATION"),
    (
        "denied",
        "access denied",
        r"^PermissionDenied|^Unauthenticated|Forbidden|Anonymous caller|AccessDenied",
    ),
    (
        "protocol",
        "the endpoint speaks http where https was asked for, or the reverse",
        r"InvalidContentType|BadScheme|WRONG_VERSION_NUMBER",
    ),
    ("certificate", "its certificate is not trusted", r"[Cc]ertificate|UnknownIssuer"),
    ("refused", "connection refused", r"Connection ?[Rr]efused|Connect call failed"),
    (
        "host",
        "unknown host",
        r"dns error|Name or service not known|getaddrinfo|nodename nor servname",
    ),
    ("time", "no answer in time", r"TimedOut|kind: Timeout|[Tt]imed out|TimeoutError"),
    (
        "lost",
        "the connection broke",
        r"kind: (Connect|Request|Decode|Interrupted)|ClientConnectorError|Disconnected",
    ),
]
_KINDS_OF_REQUEST = {"bucket", "key", "credentials", "region", "denied", "protocol", "unsupported"}

_VARIABLES = {
    S3: "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    AZURE: "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
    GOOGLE: "GOOGLE_APPLICATION_CREDENTIALS",
}
_ENDPOINTS = {
    S3: "--endpoint (or AWS_ENDPOINT_URL)",
    AZURE: "AZURE_STORAGE_ACCOUNT_NAME (or --endpoint)",
}


@dataclass(frozen=True, slots=True)
class Cause:
    """What an error of a store means: a kind to act on, and words to read."""

    kind: str
    words: str

    @property
    def is_of_request(self) -> bool:
        """Tell whether the request is wrong, so that the same one cannot succeed."""
        return self.kind in _KINDS_OF_REQUEST


def is_store_failure(error: BaseException) -> bool:
    """Tell whether an error comes from a store, and not from the data in it."""
    if isinstance(error, obstore.exceptions.BaseError | ConnectionError | TimeoutError):
        return True
    # Some codecs raise OSError too, but only the system numbers its errors.
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return type(error).__module__.partition(".")[0] in _CLIENT_LIBRARIES


def require_bucket(error: FileNotFoundError) -> None:
    """Raise the error again if not only an object is missing, but all that could hold it: that is no answer."""
    if understand(error).kind == "bucket":
        raise error


def cause_of(error: BaseException) -> str:
    """Return one line for an error of a store: words without address, debug output or secrets."""
    if isinstance(error, MegasegError):
        return str(error)
    if "LocalFileSystem" in str(error):
        return _first_line(error)
    return getattr(error, "strerror", None) or understand(error).words


def explain(url: str, verb: str, error: BaseException) -> tuple[Cause, str]:
    """Return what an error means, and a line with the place, the cause and the next step."""
    cause = Cause("other", cause_of(error)) if scheme_of(url) == LOCAL else understand(error)
    step = _next_step(cause.kind, verb, url)
    return cause, f"cannot {verb} {url}: {cause.words}" + (f"; {step}" if step else "")


def understand(error: BaseException) -> Cause:
    """Return what an error of a store means."""
    if isinstance(error, io.UnsupportedOperation):
        return Cause("unsupported", str(error))
    text = f"{type(error).__name__}: {error}"
    host, status, code = _host_of(text), _status_of(error, text), _code_of(text)
    if re.search(r"/latest/(api|meta-data)|/metadata/identity", text):
        # The last place where a client looks: the service that tells a virtual machine who it is.
        return Cause("credentials", "no credentials were found")
    if re.search(r"Range request not supported|Invalid byte range", text):
        return Cause("ranges", "the server does not answer requests for a part of an object")
    if isinstance(error, FileNotFoundError) and re.search(r"(^|/)b/[^/]+/o$", str(error)):
        return Cause("bucket", "there is no such bucket")
    for kind, words, codes, statuses in _ANSWERS:
        if code in codes or status in statuses:
            return Cause(kind, f"{words} ({code or status})")
    for kind, words, pattern in [] if status else _SILENCE:
        if re.search(pattern, text, re.MULTILINE):
            return Cause(kind, words + (f" ({host})" if host else ""))
    return Cause("other", _without_secrets(_answer_of(text) or _first_line(error)))


def _status_of(error: BaseException, text: str) -> int | None:
    found = re.search(r"status code: (\d{3})", text)
    # The libraries below fsspec keep it in one attribute or another.
    status = str(
        found[1] if found else getattr(error, "status", None) or getattr(error, "code", None)
    )
    return int(status) if re.fullmatch(r"[1-5]\d\d", status) else None


def _code_of(text: str) -> str | None:
    found = re.search(r"<Code>(\w+)</Code>|\(code: (\w+)\)", text)
    return (found[1] or found[2]) if found else None


def _host_of(text: str) -> str:
    found = re.search(r"https?://(?:[^\s/@]*@)?([^\s,)/?]+)|Cannot connect to host (\S+)", text)
    return (found[1] or found[2]) if found else ""


def _answer_of(text: str) -> str:
    """Return status and message of an answer that means nothing in particular."""
    status, message = (
        re.search(r"status code: (\d{3}[^:<\n]*)", text),
        re.search(r"<Message>([^\n<]+)", text),
    )
    return ": ".join(found[1].strip() for found in (status, message) if found)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip() or type(error).__name__


def _next_step(kind: str, verb: str, url: str) -> str:
    scheme = scheme_of(url)
    variables, endpoint = (
        _VARIABLES.get(scheme, "the credentials"),
        _ENDPOINTS.get(scheme, "the address"),
    )
    anonymous = (
        ", or pass --anon if the data are public" if verb in ("read", "list", "open") else ""
    )
    if scheme in WEB and kind == "denied":
        return "data behind a login cannot be read; copy them, or ask for a bucket's address"
    if kind in ("denied", "credentials") and access.current().is_anonymous(url):
        return f"it is not public: leave out --anon, and set {variables}"
    return {
        "bucket": f"check its name and {endpoint}",
        "key": f"check {variables}",
        "credentials": f"set {variables}{anonymous}",
        "denied": f"check whether {variables} may {verb} it{anonymous}",
        "region": "set AWS_REGION to the region of the bucket",
        "ranges": "sharded arrays need that: serve them with nginx, Caddy or an object store, or copy the image",
        "protocol": f"check http:// or https:// in {endpoint}",
        "certificate": "name a file with its authority: SSL_CERT_FILE=FILE in the environment",
        "refused": f"check that the store is running, and {endpoint}",
        "host": f"check the network and {endpoint}",
        "time": f"check the network and {endpoint}",
    }.get(kind, "")


def _without_secrets(words: str) -> str:
    """Blank out what a message might repeat of the credentials that were used."""
    for secret in access.secrets():
        words = words.replace(secret, "***")
    return words

"""Errors of stores in one line: the address, the cause and the next step.

The clients' exceptions tell a denial, an absent object and an unsupported
request by their type. All else is in their text, over many lines, and this is
the one module that reads it.
"""

import errno
import io
import re
from dataclasses import dataclass

import obstore.exceptions

from megaseg_dask.errors import MegasegError, StoreError
from megaseg_dask.stores.access import first_line, without_secrets
from megaseg_dask.stores.address import AZURE, LOCAL, S3, WEB, scheme_of
from megaseg_dask.stores.clouds import CLOUDS

_DENIED = (
    obstore.exceptions.PermissionDeniedError,
    obstore.exceptions.UnauthenticatedError,
)
_DENIED_HERE = (errno.EACCES, errno.EPERM)
_NOT_WRITABLE = (*_DENIED_HERE, errno.EROFS)


@dataclass(frozen=True, slots=True)
class Cause:
    """The meaning of a store's error: a kind to act on, and words to read."""

    kind: str
    words: str

    @property
    def is_of_request(self) -> bool:
        """Return whether the request is wrong, so that repeating it cannot help."""
        return self.kind in _KINDS_OF_REQUEST


_KINDS_OF_REQUEST = {
    "bucket",
    "clock",
    "credentials",
    "denied",
    "key",
    "protocol",
    "region",
    "unsupported",
}

_NO_BUCKET = Cause("bucket", "there is no such bucket")
_UNKNOWN_KEY = Cause("key", "the access key is unknown to the store")
_WRONG_SECRET = Cause("key", "the secret does not match the access key")
_EXPIRED = Cause("key", "the credentials have expired")
_OTHER_REGION = Cause("region", "the bucket is in another region")
_ACCESS_DENIED = Cause("denied", "access denied")
_BUSY = Cause("busy", "the store is too busy")
_SLOW = Cause("lost", "the request reached the store too slowly")
_WRONG_TIME = Cause("clock", "the clock of this machine is wrong")

# Answers by their code, which S3, Azure and Google send.
_CODES = {
    "NoSuchBucket": _NO_BUCKET,
    "ContainerNotFound": _NO_BUCKET,
    "InvalidAccessKeyId": _UNKNOWN_KEY,
    "SignatureDoesNotMatch": _WRONG_SECRET,
    "AuthenticationFailed": _WRONG_SECRET,
    "ExpiredToken": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "PermanentRedirect": _OTHER_REGION,
    "AuthorizationHeaderMalformed": _OTHER_REGION,
    "AccessDenied": _ACCESS_DENIED,
    "AuthorizationFailure": _ACCESS_DENIED,
    "RequestTimeout": _SLOW,
    "RequestTimeTooSkewed": _WRONG_TIME,
    "SlowDown": _BUSY,
    "ServerBusy": _BUSY,
}
# Answers without a known code, by their status.
_STATUSES = {
    301: _OTHER_REGION,
    307: _OTHER_REGION,
    401: _ACCESS_DENIED,
    403: _ACCESS_DENIED,
    429: _BUSY,
    503: _BUSY,
}
# Requests without an answer, by the words of the client.
_NO_ANSWER = [
    (r"Invalid Access Key", Cause("key", "the secret is not one")),
    (r"redirect without LOCATION", _OTHER_REGION),
    (
        r"InvalidContentType|BadScheme|WRONG_VERSION_NUMBER",
        Cause("protocol", "the endpoint uses http instead of https, or https instead of http"),
    ),
    (r"[Cc]ertificate|UnknownIssuer", Cause("certificate", "its certificate is not trusted")),
    (r"Connection ?[Rr]efused", Cause("refused", "connection refused")),
    (r"dns error", Cause("host", "unknown host")),
    (r"TimedOut|kind: Timeout|[Tt]imed out|TimeoutError", Cause("time", "no answer in time")),
    (
        r"kind: (Connect|Request|Decode|Interrupted)",
        Cause("lost", "the connection was interrupted"),
    ),
]
# The service that tells a virtual machine who it is: the last place where a client looks.
_MACHINE_IDENTITY = r"/latest/(api|meta-data)|/metadata/identity"
_NO_RANGES = r"Range request not supported|Invalid byte range"
_NO_LOGIN = r"credential provider: (.*)"

_ENDPOINTS = {
    S3: "--endpoint (or AWS_ENDPOINT_URL)",
    AZURE: "AZURE_STORAGE_ACCOUNT_NAME (or --endpoint)",
}


def is_store_failure(error: BaseException) -> bool:
    """Return whether an error comes from a store, and not from the data in it."""
    if isinstance(error, obstore.exceptions.BaseError | ConnectionError | TimeoutError):
        return True
    # Some codecs raise OSError too, but only the system numbers its errors.
    return isinstance(error, OSError) and error.errno is not None


def is_denied(error: BaseException) -> bool:
    """Return whether a store denied a request, also where another error names that."""
    reason = error.__cause__ or error
    return is_store_failure(reason) and understand(reason).kind == "denied"


def why_not_writable(error: StoreError) -> str:
    """Return why this user, or nobody, may write there; empty if a write failed otherwise."""
    reason = error.__cause__
    if reason is None:
        return ""
    is_refused = isinstance(reason, OSError) and reason.errno in _NOT_WRITABLE
    return cause_of(reason) if is_refused or is_denied(reason) else ""


def is_of_object(url: str, error: StoreError) -> bool:
    """Return whether a store failed for one object alone, so that others may still be read.

    A store that is lost would lose all others too, and a later run may find it back.
    """
    return scheme_of(url) == LOCAL or understand(error.__cause__ or error).is_of_request


def require_bucket(error: FileNotFoundError) -> None:
    """Raise an error again that means an absent bucket, and not only an absent object."""
    if understand(error).kind == "bucket":
        raise error


def cause_of(error: BaseException) -> str:
    """Return one line for an error of a store: no address, no debug output, no secrets."""
    if isinstance(error, MegasegError):
        return str(error)
    if "LocalFileSystem" in str(error):
        return first_line(error)
    return getattr(error, "strerror", None) or understand(error).words


def explain(
    url: str, verb: str, error: BaseException, *, anonymous: bool = False
) -> tuple[Cause, str]:
    """Return the cause of an error, and a line with the address, the cause and the next step.

    ``verb`` is the failed action, such as ``"read"``; ``anonymous`` tells whether
    the store was asked without credentials.
    """
    if scheme_of(url) == LOCAL:
        is_denied_here = isinstance(error, OSError) and error.errno in _DENIED_HERE
        cause = Cause("denied" if is_denied_here else "other", cause_of(error))
    else:
        cause = understand(error)
    line = f"cannot {verb} {url}: {cause.words}"
    step = _next_step(cause.kind, verb, url, anonymous=anonymous)
    return cause, f"{line}; {step}" if step else line


def understand(error: BaseException) -> Cause:
    """Return the cause of a store's error."""
    if isinstance(error, io.UnsupportedOperation):
        return Cause("unsupported", str(error))
    text = f"{type(error).__name__}: {error}"
    if re.search(_MACHINE_IDENTITY, text):
        return Cause("credentials", "no credentials were found")
    if re.search(_NO_RANGES, text):
        return Cause("ranges", "the server does not answer requests for a part of an object")
    login = re.search(_NO_LOGIN, text)
    if login:
        words = f"no credentials were found: {without_secrets(login[1])}"
        return Cause("credentials", words)
    return _cause_of_answer(text) or _cause_of_silence(error, text)


def _cause_of_answer(text: str) -> Cause | None:
    """Return the cause that a store's answer tells, if there is an answer of a known kind."""
    answer = re.search(r"<Code>(\w+)</Code>|\(code: (\w+)\)", text)
    code = (answer[1] or answer[2]) if answer else ""
    status = _status_in(text)
    cause = _CODES.get(code) or _STATUSES.get(status)
    if cause is None:
        return None
    return Cause(cause.kind, f"{cause.words} ({code or status})")


def _cause_of_silence(error: BaseException, text: str) -> Cause:
    """Return the cause of an error without an answer of a known kind."""
    host = re.search(r"https?://(?:[^\s/@]*@)?([^\s,)/?]+)", text)
    suffix = f" ({host[1]})" if host else ""
    if not _status_in(text):
        for pattern, cause in _NO_ANSWER:
            if re.search(pattern, text, re.MULTILINE):
                return Cause(cause.kind, cause.words + suffix)
    if isinstance(error, _DENIED):
        return Cause(_ACCESS_DENIED.kind, _ACCESS_DENIED.words + suffix)
    return Cause("other", without_secrets(_answer_in(text)) or first_line(error))


def _status_in(text: str) -> int:
    """Return the HTTP status of an answer, 0 if there is no answer."""
    status = re.search(r"status code: ([1-5]\d\d)", text)
    return int(status[1]) if status else 0


def _answer_in(text: str) -> str:
    """Return status and message of an answer of no known kind."""
    status = re.search(r"status code: (\d{3}[^:<\n]*)", text)
    message = re.search(r"<Message>([^\n<]+)", text)
    return ": ".join(match[1].strip() for match in (status, message) if match)


def _next_step(kind: str, verb: str, url: str, *, anonymous: bool) -> str:
    scheme = scheme_of(url)
    variables = CLOUDS[scheme].usual_variables if scheme in CLOUDS else "the credentials"
    endpoint = _ENDPOINTS.get(scheme, "the address")
    if scheme == LOCAL and kind == "denied":
        return f"check whether your user may {verb} it, and may enter the folders above it"
    if scheme in WEB and kind == "denied":
        return (
            "data behind a web login cannot be read; copy them, or ask for the address of a bucket"
        )
    if anonymous and kind in ("denied", "credentials"):
        return f"the data are not public: remove --anon, and set {variables}"
    public = ""
    if verb in ("read", "list", "open"):
        public = ", or pass --anon if the data are public"
    steps = {
        "bucket": f"check its name and {endpoint}",
        "key": f"check {variables}",
        "credentials": f"set {variables}{public}",
        "denied": f"check whether {variables} may {verb} it{public}",
        "region": "set AWS_REGION to the region of the bucket",
        "clock": "correct the clock",
        "ranges": (
            "sharded arrays need such requests: use nginx, Caddy or an object store as the server, "
            "or copy the image"
        ),
        "protocol": f"check http:// or https:// in {endpoint}",
        "certificate": "set SSL_CERT_FILE to the file of its certificate authority",
        "refused": f"check that the store is running, and {endpoint}",
        "host": f"check the network and {endpoint}",
        "time": f"check the network and {endpoint}",
    }
    return steps.get(kind, "")

"""What an address is: a path or a URL, checked, taken apart and put together; no store is asked.

URLs of object stores hold keys as they are. Those of web servers are
percent-encoded, in one way only, so that equal places have equal URLs.
"""

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from megaseg_dask.errors import SettingsError

LOCAL = "file"
S3, AZURE, GOOGLE = "s3", "az", "gs"
WEB = ("http", "https")
_HOSTED = (S3, AZURE, GOOGLE, *WEB)

_ALIASES = {"s3a": S3, "gcs": GOOGLE, "azure": AZURE, "abfs": AZURE, "abfss": AZURE}
_AZURE_HOST = re.compile(r"([^@/]+)@([a-z0-9]+)\.(?:dfs|blob)\.core\.windows\.net")
_UNESCAPED = "/~!$&'()*+,;=:@"


def normalise(address: str | Path) -> str:
    """Return an absolute path, or a URL as it is compared: one spelling for one place.

    Raises :class:`SettingsError` for what cannot be an address, without repeating credentials in it.
    """
    text = str(address).removeprefix("file://")
    if not text:
        raise SettingsError("an empty path names no image; give a folder such as cells.zarr")
    scheme, separator, rest = text.partition("://")
    if not separator:
        # Not resolve: a link stays the address that the user knows.
        return os.path.normpath(Path(text).expanduser().absolute())
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or "://" in rest:
        raise SettingsError(
            f"{scheme}://…: not a URL that can be opened; chains of URLs are not followed"
        )
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if not rest.isprintable() or "\\" in rest:
        # Clients and servers do not agree on what they mean.
        raise SettingsError(
            f"{scheme}://{rest!r}: control characters and backslashes cannot be part of an address"
        )
    _require_no_secrets(scheme, rest)
    return _normalise_web(text) if scheme in WEB else _normalise_keys(scheme, rest)


def _require_no_secrets(scheme: str, rest: str) -> None:
    """Refuse credentials in a URL: it goes into the plan, the output's metadata and every message."""
    host, _, path = rest.partition("/")
    # Elsewhere, as in sftp://me@host, a name without a password is half of the address.
    named = (
        "@" in host
        and not _AZURE_HOST.fullmatch(host)
        and (scheme in _HOSTED or ":" in host.rpartition("@")[0])
    )
    if named or re.search(r"[?&](sig|x-amz-[a-z-]+)=", rest, re.IGNORECASE):
        raise SettingsError(
            f"{scheme}://…: credentials do not belong in a URL, which is recorded; set them in the environment"
        )
    if scheme in WEB and re.search("[?#]", path):
        raise SettingsError(
            f"{scheme}://{host}/…: an address with ? or # names one document, not a folder of data"
        )


def _normalise_web(text: str) -> str:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError(
            f"{text}: {error}; expected something like https://host:8080/cells.zarr"
        ) from error
    if not host:
        raise SettingsError(f"{text}: no host; expected something like https://host/cells.zarr")
    default = {"http": 80, "https": 443}[parts.scheme]
    place = (f"[{host}]" if ":" in host else host) + ("" if port in (None, default) else f":{port}")
    path = _clean(unquote(parts.path))
    return f"{parts.scheme}://{place}" + (f"/{quote(path, safe=_UNESCAPED)}" if path else "")


def _normalise_keys(scheme: str, rest: str) -> str:
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise SettingsError(
            f"{scheme}://{rest}: no bucket; expected something like {scheme}://bucket/cells.zarr"
        )
    key = _clean(key)
    return f"{scheme}://{bucket}" + (f"/{key}" if key else "")


def _clean(path: str) -> str:
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise SettingsError(f"…/{path}: '..' has no meaning in a URL; name the folder itself")
    return "/".join(parts)


def scheme_of(url: str) -> str:
    """Return the scheme of a normalised address; ``file`` for a path."""
    scheme, separator, _ = url.partition("://")
    return scheme if separator else LOCAL


def split(url: str) -> tuple[str, str]:
    """Return the root of a URL, such as ``s3://bucket`` or ``https://host``, and the key below it."""
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    return f"{scheme}://{host}", unquote(key) if scheme in WEB else key


def join(url: str, name: str) -> str:
    """Return the address of something below a folder."""
    if not name:
        return url
    return f"{url.rstrip('/')}/{quote(name, safe=_UNESCAPED) if scheme_of(url) in WEB else name}"


def last_part(url: str) -> str:
    """Return the last name of an address; the bucket or host of a root."""
    if scheme_of(url) == LOCAL:
        return Path(url).name
    root, key = split(url)
    return PurePosixPath(key).name or root.partition("://")[2]


def parent_of(url: str) -> str:
    """Return the folder that holds an address; the root of a store is its own parent."""
    if scheme_of(url) == LOCAL:
        return str(Path(url).parent)
    root, key = split(url)
    return url.rpartition("/")[0] if key else root


def azure_names(root: str) -> tuple[str, str | None]:
    """Return container and account of ``az://container`` or ``az://container@account.dfs.core.windows.net``."""
    host = root.partition("://")[2]
    found = _AZURE_HOST.fullmatch(host)
    return (found[1], found[2]) if found else (host, None)

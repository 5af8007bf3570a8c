"""Addresses: paths and URLs, checked, taken apart and put together; no store is asked.

URLs of object stores hold keys as they are. Those of web servers are
percent-encoded, in one way only, so that equal places have equal URLs.
"""

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from megaseg_dask.errors import SettingsError, SourceError

LOCAL = "file"
S3 = "s3"
AZURE = "az"
GOOGLE = "gs"
WEB = ("http", "https")
SCHEMES = (LOCAL, S3, AZURE, GOOGLE, *WEB)

_ALIASES = {"s3a": S3, "gcs": GOOGLE, "azure": AZURE, "abfs": AZURE, "abfss": AZURE}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_AZURE_HOST = re.compile(r"([^@/]+)@([a-z0-9]+)\.(?:dfs|blob)\.core\.windows\.net")
_SIGNATURE = re.compile(r"[?&](sig|x-amz-[a-z-]+)=", re.IGNORECASE)
# Zip files that hold one image, as RFC-9 of OME-Zarr names them.
_PACKED = re.compile(r".+(\.ozx|\.zarr\.zip)", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_UNESCAPED = "/~!$&'()*+,;=:@"


def normalize(address: str | Path) -> str:
    """Return an absolute path, or a URL as it is compared: one spelling for one place.

    Raises:
        SettingsError: This cannot be an address; the message repeats no credentials in it.
    """
    text = _path_of_file_url(str(address))
    if not text:
        raise SettingsError("the path is empty; give a folder such as cells.zarr")
    scheme, separator, rest = text.partition("://")
    if not separator:
        # Links are not resolved: the user knows the address of the link.
        return os.path.normpath(Path(text).expanduser().absolute())
    if not _SCHEME.fullmatch(scheme) or "://" in rest:
        raise SettingsError(
            f"{scheme}://…: not a URL that can be opened; chained URLs are not supported"
        )
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if not rest.isprintable() or "\\" in rest:
        # Clients and servers do not agree on their meaning.
        raise SettingsError(
            f"{scheme}://{rest!r}: an address cannot contain control characters or backslashes"
        )
    _require_no_secrets(scheme, rest)
    if scheme in WEB:
        return _normalize_web(text)
    return _normalize_keys(scheme, rest)


def _path_of_file_url(text: str) -> str:
    """Return the path that a ``file://`` URL means, in which %20 is a space; else the text."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme.lower() != LOCAL:
        return text
    return unquote(re.sub("^localhost(?=/)", "", rest))


def _require_no_secrets(scheme: str, rest: str) -> None:
    """Refuse credentials in a URL: it is written into the plan, the output and every message."""
    host, _, path = rest.partition("/")
    if _names_user(scheme, host) or _SIGNATURE.search(rest):
        raise SettingsError(
            f"{scheme}://…: do not put credentials in a URL, because it is recorded; set them in "
            "the environment"
        )
    if scheme in WEB and re.search("[?#]", path):
        raise SettingsError(
            f"{scheme}://{host}/…: an address with ? or # is one document, not a folder of data"
        )


def _names_user(scheme: str, host: str) -> bool:
    user, at, _ = host.rpartition("@")
    if not at or _AZURE_HOST.fullmatch(host):
        return False
    # Elsewhere, as in sftp://me@host, a name without a password is part of the address.
    return scheme in SCHEMES or ":" in user


def _normalize_web(text: str) -> str:
    try:
        parts = urlsplit(text)
        host = parts.hostname
        port = parts.port
    except ValueError as error:
        raise SettingsError(
            f"{text}: {error}; expected something like https://host:8080/cells.zarr"
        ) from error
    if not host:
        raise SettingsError(f"{text}: no host; expected something like https://host/cells.zarr")
    server = f"[{host}]" if ":" in host else host
    if port not in (None, _DEFAULT_PORTS[parts.scheme]):
        server = f"{server}:{port}"
    path = quote(_clean(unquote(parts.path)), safe=_UNESCAPED)
    return f"{parts.scheme}://{server}/{path}".rstrip("/")


def _normalize_keys(scheme: str, rest: str) -> str:
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise SettingsError(
            f"{scheme}://{rest}: no bucket; expected something like {scheme}://bucket/cells.zarr"
        )
    return f"{scheme}://{bucket}/{_clean(key)}".rstrip("/")


def _clean(path: str) -> str:
    """Return a path without empty parts."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise SettingsError(f"…/{path}: '..' is not allowed in a URL; give the folder itself")
    return "/".join(parts)


def scheme_of(url: str) -> str:
    """Return the scheme of a normalized address; ``file`` for a path."""
    scheme, separator, _ = url.partition("://")
    return scheme if separator else LOCAL


def split(url: str) -> tuple[str, str]:
    """Return the root of a URL, ``s3://bucket`` or ``https://host``, and the key below it."""
    scheme, _, rest = url.partition("://")
    host, _, key = rest.partition("/")
    if scheme in WEB:
        key = unquote(key)
    return f"{scheme}://{host}", key


def split_packed(url: str) -> tuple[str, str] | None:
    """Return the address of the zip file that an address leads into, and the key in it.

    ``None`` if no part of the address has the name of one.
    """
    parts = url.split("/")
    n_root = 1 if scheme_of(url) == LOCAL else 3
    for n, part in enumerate(parts[n_root:], start=n_root + 1):
        if _PACKED.fullmatch(part):
            key = "/".join(parts[n:])
            return "/".join(parts[:n]), unquote(key) if scheme_of(url) in WEB else key
    return None


def join(url: str, name: str) -> str:
    """Return the address of something below a folder.

    Raises:
        SourceError: The name leads out of the folder; names come from metadata and records too.
    """
    if not name:
        return url
    if ".." in name.split("/"):
        raise SourceError(
            f"the path {name!r} leads out of {url} and is not followed; correct the metadata"
        )
    if scheme_of(url) in WEB:
        name = quote(name, safe=_UNESCAPED)
    return f"{url.rstrip('/')}/{name}"


def last_part(url: str) -> str:
    """Return the last name of an address; the bucket or host of a root."""
    if scheme_of(url) == LOCAL:
        return Path(url).name
    root, key = split(url)
    if key:
        return PurePosixPath(key).name
    return root.partition("://")[2]


def parent_of(url: str) -> str:
    """Return the folder that holds an address; the root of a store is its own parent."""
    if scheme_of(url) == LOCAL:
        return str(Path(url).parent)
    root, key = split(url)
    return url.rpartition("/")[0] if key else root


def azure_names(root: str) -> tuple[str, str | None]:
    """Return container and account of ``az://container`` or ``az://container@account.dfs…``."""
    host = root.partition("://")[2]
    names = _AZURE_HOST.fullmatch(host)
    return (names[1], names[2]) if names else (host, None)

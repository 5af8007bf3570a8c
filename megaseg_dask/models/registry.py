"""Where a model's name leads: the starter in the package, the cache, a bundle on disk, or a bucket to fetch it from.

The published models lie in a public bucket; another one is named by
``MEGASEG_BUCKET``. With ``MEGASEG_OFFLINE`` set no network is asked.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath

from megaseg_dask.errors import BundleError, MegasegError
from megaseg_dask.events import Event, Fetching
from megaseg_dask.messages import first_few, one_line
from megaseg_dask.models import cache
from megaseg_dask.models.bundle import Bundle, BundleFacts
from megaseg_dask.models.cache import FORMS, Record, is_name, read_record
from megaseg_dask.models.cytodl.read import load_bundle
from megaseg_dask.models.depot import Depot, Entry
from megaseg_dask.models.download import discard, download, turn
from megaseg_dask.models.facts import read_facts
from megaseg_dask.models.home import home
from megaseg_dask.stores import Location

# Name → object in the public bucket, where its name is known.
PUBLISHED: Mapping[str, str | None] = {"MegaSeg_v1": "megaSeg.zip", "MegaSeg_light": None}
PUBLIC_BUCKET, PUBLIC_REGION = "production-aics-ml-segmenter-models", "us-west-2"
PUBLIC_ENDPOINT = f"https://s3.{PUBLIC_REGION}.amazonaws.com"
BUCKET, OFFLINE = "MEGASEG_BUCKET", "MEGASEG_OFFLINE"

_emit: ContextVar[Callable[[Event], None]] = ContextVar("_emit", default=lambda _: None)


@contextmanager
def reporting(emit: Callable[[Event], None]) -> Iterator[None]:
    """Tell ``emit`` of the progress of what is fetched meanwhile."""
    token = _emit.set(emit)
    try:
        yield
    finally:
        _emit.reset(token)


# -- what a name means


def locate(model: str) -> Path:
    """Return the bundle that a name, path or URL means, fetched if need be.

    Raises :class:`BundleError` that says how to get it.
    """
    found = find(model)
    if found is None and model in PUBLISHED:
        found = _fetch_or_advise(model, None).path
    if found is None and "://" in model:
        name = PurePosixPath(model).stem
        if not is_name(name) or cache.folder_of(name).exists():
            raise BundleError(
                f"--model {model}: fetch it under a name of its own, `megaseg models fetch {model} "
                "--name NAME`, and pass that"
            )
        found = _fetch_or_advise(name, model).path
    if found is None:
        raise BundleError(
            f"--model {one_line(model)}: neither a known model ({', '.join([*PUBLISHED, 'starter'])}), nor one in the "
            f"cache ({first_few(cache.cached_names()) or 'empty'}), nor a path that exists; see `megaseg models list`"
        )
    return found


def find(model: str) -> Path | None:
    """Return the bundle that a name, path or URL means, if it is on this machine; a name comes before a path."""
    if model == "starter":
        return _starter()
    if is_name(model) and (record := read_record(model)):
        return record.path
    if "://" in model:
        return next((record.path for record in _records() if record.source == model), None)
    path = Path(model).expanduser()
    return path.absolute() if path.exists() else None


def describe(model: str, checkpoint: str | None = None) -> tuple[Path, BundleFacts]:
    """Return where a model is and what it says, without torch if it was read before.

    One of the cache must be what was recorded of it. Raises :class:`BundleError`.
    """
    path = locate(model)
    record = _record_at(path)
    if record:
        return path, cache.read_cached_facts(record, checkpoint)
    return path, read_facts(path, checkpoint)


def load(model: str, checkpoint: str | None = None) -> tuple[Path, Bundle]:
    """Locate and load a model; one of the cache must be what was recorded of it. Raises :class:`BundleError`."""
    path = locate(model)
    record = _record_at(path)
    if record:
        return path, cache.load_cached(record, checkpoint)
    return path, load_bundle(path, checkpoint)


def _record_at(path: Path) -> Record | None:
    return next((record for record in _records() if record.path == path), None)


def _starter() -> Path:
    spec = importlib.util.find_spec("megaseg_dask")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "models" / "starter"


def _records() -> Iterator[Record]:
    for name in cache.cached_names():
        try:
            record = read_record(name)
        except BundleError:
            # Who asks for it by name hears of it.
            continue
        if record:
            yield record


def _fetch_or_advise(name: str, url: str | None) -> Record:
    """Fetch a model that is not in the cache; what prevents it is told with the other ways to get it."""
    try:
        return fetch(name, url=url)
    except MegasegError as error:
        brought = PUBLISHED.get(name) or f"{name}.zip"
        raise BundleError(
            f"{name} is not in the cache {home()} and was not fetched: {error}. Where there is a network run "
            f"`megaseg models fetch {url or name}`, or bring its zip here and run `megaseg models import {brought} "
            f"{name}`; --model starter is a small model of this project that ships with it"
        ) from error


# -- buckets


def is_offline() -> bool:
    """Tell whether ``MEGASEG_OFFLINE`` forbids to ask the network."""
    return os.environ.get(OFFLINE, "").lower() not in ("", "0", "no", "false")


def open_depot(bucket: str | None = None, endpoint: str | None = None) -> Depot:
    """Return the bucket where models are, by default the public one; its name or address may be in ``MEGASEG_BUCKET``.

    Raises :class:`BundleError` where no network may be asked.
    """
    if is_offline():
        raise BundleError(
            f"{OFFLINE} is set, so no network is asked; unset it, or `megaseg models import` a zip you bring"
        )
    bucket = bucket or os.environ.get(BUCKET)
    if bucket:
        return Depot.of(bucket if "://" in bucket else f"s3://{bucket}", endpoint)
    # AWS_ENDPOINT_URL is where the user's data are, not that bucket.
    return Depot.of(
        f"s3://{PUBLIC_BUCKET}", endpoint or PUBLIC_ENDPOINT, PUBLIC_REGION, public=True
    )


def offered(depot: Depot) -> dict[str, Entry]:
    """List the models of a bucket: its zips and checkpoints, by the names under which `fetch` gets them."""
    found: dict[str, Entry] = {}
    known = {key: name for name, key in PUBLISHED.items() if key}
    for entry in depot.entries():
        file = PurePosixPath(entry.key)
        name = known.get(file.name) or next(
            (n for n in PUBLISHED if _plain(n) == _plain(file.stem)), file.stem
        )
        if file.suffix in FORMS and is_name(name):
            found.setdefault(name, entry)
    return found


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()


def _find_entry(depot: Depot, name: str, key: str | None) -> Entry:
    wanted = key or PUBLISHED.get(name) or f"{name}.zip"
    if entry := depot.entry(wanted):
        return entry
    if not depot.location.is_listable:
        raise BundleError(f"{depot} has no {wanted}; check the address")
    models = offered(depot)
    if key is None and name in models:
        return models[name]
    listed = first_few(map(one_line, models), 10) or "no models"
    raise BundleError(
        f"{depot} has no {one_line(wanted)}; it has {listed}: fetch one of them by its name, or say "
        "which object it is with --object"
    )


# -- into the cache


def fetch(
    name: str,
    *,
    url: str | None = None,
    key: str | None = None,
    bucket: str | None = None,
    endpoint: str | None = None,
    sha256: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Fetch a model into the cache under a name: from a URL, else from a bucket; one that is there is only checked.

    Raises :class:`StoreError` if the store is lost on the way, which the same
    command resumes, and :class:`BundleError` for what is no bundle, or not the one asked for.
    """
    if not overwrite and (record := read_record(name)):
        return _require_same(record, url, key, sha256)
    cache.require_name(name)
    if url:
        place = Location.of(url)
        bucket, key = place.parent.url, place.basename
    depot = open_depot(bucket, endpoint)
    if key and PurePosixPath(key).suffix not in FORMS:
        raise BundleError(f"{depot}: expected a .zip or .ckpt, and {one_line(key)} is neither")
    entry = _find_entry(depot, name, key)
    form = PurePosixPath(entry.key).suffix
    tell = _teller(name, entry)
    with turn(name, tell):
        if not overwrite and (record := read_record(name)):
            return record  # another process was faster
        try:
            part = download(depot, entry, name, tell, sha256)
            record = cache.install(
                name,
                form,
                lambda to: _move(part, to),
                source=url or entry.url,
                version=entry.version,
            )
        except BundleError as error:
            # What is wrong with its bytes is not mended by more of them.
            discard(name)
            told = (
                str(error) if entry.url in str(error) else f"{entry.url}: {error}; it was removed"
            )
            raise BundleError(told) from error
        discard(name)
    return record


def _move(file: Path, to: Path) -> None:
    file.replace(to)


def _require_same(record: Record, url: str | None, key: str | None, sha256: str | None) -> Record:
    """Check a model that is in the cache against what was asked for, and against its record."""
    other = (url and record.source != url) or (
        key and PurePosixPath(record.source).name != PurePosixPath(key).name
    )
    if other or (sha256 and record.sha256 != sha256.lower()):
        raise BundleError(
            f"{record.name} is in the cache already, from {record.source} with SHA-256 {record.sha256}; "
            "choose another name, or pass --overwrite to replace it"
        )
    cache.read_cached_facts(record)
    return record


def _teller(name: str, entry: Entry) -> Callable[[int], None]:
    """Return what makes events of a number of bytes."""
    started, first = time.monotonic(), [-1]

    def tell(n_bytes: int) -> None:
        if first[0] < 0:
            first[0] = n_bytes
        elapsed = time.monotonic() - started
        rate = (n_bytes - first[0]) / elapsed if elapsed else 0.0
        _emit.get()(
            Fetching(name, entry.url, n_bytes, entry.n_bytes, round(elapsed, 2), round(rate))
        )

    return tell

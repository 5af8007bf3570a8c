"""Where a model's name leads: the packaged starter, the cache, a bundle on disk, or a bucket.

The published models lie in a public bucket; another one is named by ``MEGASEG_BUCKET``. With
``MEGASEG_OFFLINE`` set no network is asked.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from megaseg_dask.errors import BundleError, MegasegError
from megaseg_dask.events import Emit, Fetching, ignore
from megaseg_dask.messages import first_few, one_line
from megaseg_dask.models import cache
from megaseg_dask.models.bucket import Bucket, StoredObject
from megaseg_dask.models.bundle import Bundle, BundleFacts
from megaseg_dask.models.cache import FORMS, Record, is_name, read_record
from megaseg_dask.models.cytodl.read import load_bundle
from megaseg_dask.models.download import discard, download, turn
from megaseg_dask.models.facts import read_facts
from megaseg_dask.models.home import home, sha256_of
from megaseg_dask.stores import Location

# Name → object in the public bucket, where its name is known.
PUBLISHED: Mapping[str, str | None] = {"MegaSeg_v1": "megaSeg.zip", "MegaSeg_light": None}
PUBLIC_BUCKET = "production-aics-ml-segmenter-models"
PUBLIC_REGION = "us-west-2"
PUBLIC_ENDPOINT = f"https://s3.{PUBLIC_REGION}.amazonaws.com"
BUCKET = "MEGASEG_BUCKET"
OFFLINE = "MEGASEG_OFFLINE"
STARTER = Path(__file__).parent / "starter"


# What a link ends in that asks a browser to save the file.
_SAVED = ("?download=1", "?download=true", "?dl=1")


# -- what a link means


def plain_link(url: str) -> str:
    """Return the address of a file, of a link to save it."""
    for ending in _SAVED:
        url = url.removesuffix(ending)
    return url


def file_of(url: str) -> PurePosixPath:
    """Return the file that an address is of; Zenodo's interface has ``…/NAME/content``."""
    path = PurePosixPath(plain_link(url))
    return path.parent if path.name == "content" else path


# -- what a name means


def locate(model: str, emit: Emit = ignore) -> Path:
    """Return the bundle that a name, path or URL means, fetched if need be.

    ``emit`` is told of the progress of a fetch.

    Raises:
        BundleError: There is no such model here, and it was not fetched; it says how to get it.
    """
    path = find(model)
    if path is not None:
        return path
    if model in PUBLISHED:
        return _fetch_or_advise(model, Origin(), emit).path
    if "://" in model:
        name = file_of(model).stem
        if not is_name(name) or cache.folder_of(name).exists():
            raise BundleError(
                f"--model {model}: fetch it first with `megaseg models fetch {model} --name NAME`, "
                "and pass --model NAME"
            )
        return _fetch_or_advise(name, Origin(url=model), emit).path
    raise BundleError(
        f"--model {one_line(model)}: neither a known model ({', '.join([*PUBLISHED, 'starter'])}), "
        f"nor a model in the cache ({first_few(cache.cached_names()) or 'empty'}), nor a path that "
        "exists; see `megaseg models list`"
    )


def find(model: str) -> Path | None:
    """Return the bundle that a name, path or URL means, if it is on this machine.

    A name comes before a path.

    Raises:
        BundleError: The record of a model with that name is broken.
    """
    if model == "starter":
        return STARTER
    if is_name(model) and (record := read_record(model)):
        return record.path
    if "://" in model:
        source = plain_link(model)
        return next((record.path for record in _records() if record.source == source), None)
    path = Path(model).expanduser()
    return path.absolute() if path.exists() else None


def describe(
    model: str, checkpoint: str | None = None, emit: Emit = ignore
) -> tuple[Path, BundleFacts]:
    """Return where a model is and what it says, without torch if it was read before.

    Raises:
        BundleError: As for `locate` and `read_facts`, or one of the cache is not as recorded.
    """
    path = locate(model, emit)
    if record := _record_at(path):
        return path, cache.read_cached_facts(record, checkpoint)
    return path, read_facts(path, checkpoint)


def load(model: str, checkpoint: str | None = None) -> tuple[Path, Bundle]:
    """Locate and load a model.

    Raises:
        BundleError: As for `locate` and `load_bundle`, or one of the cache is not as recorded.
    """
    path = locate(model)
    if record := _record_at(path):
        return path, cache.load_cached(record, checkpoint)
    return path, load_bundle(path, checkpoint)


def _record_at(path: Path) -> Record | None:
    """Return the record of a file of the cache; a bundle elsewhere needs no cache."""
    name = path.parent.name
    record = read_record(name) if is_name(name) and cache.folder_of(name) == path.parent else None
    return record if record and record.path == path else None


def _records() -> Iterator[Record]:
    for name in cache.cached_names():
        try:
            record = read_record(name)
        except BundleError:
            # Whoever asks for it by name hears of it.
            continue
        if record:
            yield record


# -- buckets


def is_offline() -> bool:
    """Return whether ``MEGASEG_OFFLINE`` forbids to ask the network."""
    return os.environ.get(OFFLINE, "").lower() not in ("", "0", "no", "false")


def open_bucket(address: str | None = None, endpoint: str | None = None) -> Bucket:
    """Return the bucket where models are: as given, of ``MEGASEG_BUCKET``, or the public one.

    Raises:
        BundleError: No network may be asked.
        SettingsError: It is not the name or address of a bucket.
    """
    if is_offline():
        raise BundleError(
            f"{OFFLINE} is set, so nothing is downloaded; unset it, or run `megaseg models import` "
            "with a zip file"
        )
    address = address or os.environ.get(BUCKET)
    if address:
        return Bucket.at(address if "://" in address else f"s3://{address}", endpoint)
    # AWS_ENDPOINT_URL is where the user's data are, not that bucket.
    endpoint = endpoint or PUBLIC_ENDPOINT
    return Bucket.at(f"s3://{PUBLIC_BUCKET}", endpoint, PUBLIC_REGION, is_public=True)


def offered(bucket: Bucket) -> dict[str, StoredObject]:
    """List the models of a bucket, its zips and checkpoints, by the names that `fetch` takes.

    Raises:
        BundleError: It cannot be listed.
        StoreError: The store does not answer.
    """
    models: dict[str, StoredObject] = {}
    for stored in bucket.objects():
        file = PurePosixPath(stored.key)
        name = _name_of(file)
        if file.suffix in FORMS and is_name(name):
            models.setdefault(name, stored)
    return models


def _name_of(file: PurePosixPath) -> str:
    """Return the published model that an object is by its name, else the object's own name."""
    for name, key in PUBLISHED.items():
        if file.name == key or _plain(name) == _plain(file.stem):
            return name
    return file.stem


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()


def _find_object(bucket: Bucket, name: str, key: str | None) -> StoredObject:
    expected = key or PUBLISHED.get(name) or f"{name}.zip"
    if stored := bucket.find(expected):
        return stored
    if not bucket.location.is_listable:
        raise BundleError(f"{bucket} has no {expected}; check the address")
    models = offered(bucket)
    if key is None and name in models:
        return models[name]
    listed = first_few(map(one_line, models), 10) or "no models"
    raise BundleError(
        f"{bucket} has no {one_line(expected)}; it has {listed}: fetch one of them by its name, or "
        "choose an object with --object"
    )


# -- into the cache


@dataclass(frozen=True, slots=True)
class Origin:
    """Where to fetch a model from: a URL, or an object ``key`` of a bucket.

    What is left out follows from the model's name, or is the public bucket.
    """

    url: str | None = None
    key: str | None = None
    bucket: str | None = None
    endpoint: str | None = None
    sha256: str | None = None

    def find(self, name: str) -> tuple[Bucket, StoredObject]:
        """Return the object with the model of that name, and the bucket that has it.

        Raises:
            BundleError: There is none.
            StoreError: The store does not answer.
        """
        address = self.bucket
        key = self.key
        if self.url:
            location = Location.of(plain_link(self.url))
            address = location.parent.url
            key = location.basename
        bucket = open_bucket(address, self.endpoint)
        file = file_of(self.url or key or "")
        if key and file.suffix not in FORMS:
            raise BundleError(
                f"{bucket}: expected a .zip or .ckpt, and {one_line(file.name)} is neither"
            )
        return bucket, _find_object(bucket, name, key)


def fetch(
    name: str, origin: Origin | None = None, *, overwrite: bool = False, emit: Emit = ignore
) -> Record:
    """Fetch a model into the cache under a name; one that is there is only checked.

    ``emit`` is told of the progress.

    Raises:
        BundleError: It is no bundle, or not the one asked for.
        StoreError: The store is lost on the way; the same command resumes.
    """
    origin = origin or Origin()
    record = None if overwrite else read_record(name)
    if record:
        _require_same(record, origin)
        return record
    cache.require_name(name)
    bucket, stored = origin.find(name)
    tell = _Teller(name, stored, emit)
    with turn(name, tell):
        record = None if overwrite else read_record(name)
        if record:
            return record  # another process was faster
        try:
            part = download(bucket, stored, name, tell)
            _require_digests(part, stored, origin.sha256)
            record = cache.install(
                name,
                file_of(stored.url).suffix,
                lambda file: _move(part, file),
                source=plain_link(origin.url or stored.url),
                version=stored.version,
            )
        except BundleError as error:
            # What is wrong with its bytes is not cured by more of them.
            discard(name)
            line = str(error)
            if stored.url not in line:
                line = f"{stored.url}: {line}; it was removed"
            raise BundleError(line) from error
        discard(name)
    return record


def _fetch_or_advise(name: str, origin: Origin, emit: Emit) -> Record:
    """Fetch a model that is not in the cache; an error has the other ways to get it."""
    try:
        return fetch(name, origin, emit=emit)
    except MegasegError as error:
        file = PUBLISHED.get(name) or f"{name}.zip"
        raise BundleError(
            f"{name} is not in the cache {home()} and was not fetched: {error}. With a network, "
            f"run `megaseg models fetch {origin.url or name}`. Without one, copy its zip here and "
            f"run `megaseg models import {file} {name}`. --model starter is a small model that "
            "comes with this package"
        ) from error


def _move(part: Path, file: Path) -> None:
    part.replace(file)


def _require_digests(part: Path, stored: StoredObject, sha256: str | None) -> None:
    for algorithm, expected, witness in (
        ("md5", stored.md5, "the store states"),
        ("sha256", sha256, "--sha256 states"),
    ):
        found = sha256_of(part, algorithm) if expected else None
        if expected and found != expected.lower():
            raise BundleError(
                f"{stored.url}: what was received has {algorithm.upper()} {found}, {witness} "
                f"{expected}; it was removed, fetch it again"
            )


def _require_same(record: Record, origin: Origin) -> None:
    """Check a model that is in the cache against what was asked for, and against its record."""
    is_other = origin.url is not None and record.source != plain_link(origin.url)
    if origin.key is not None:
        is_other |= PurePosixPath(record.source).name != PurePosixPath(origin.key).name
    if origin.sha256 is not None:
        is_other |= record.sha256 != origin.sha256.lower()
    if is_other:
        raise BundleError(
            f"{record.name} is already in the cache, from {record.source} with SHA-256 "
            f"{record.sha256}; choose another name, or pass --overwrite to replace it"
        )
    cache.read_cached_facts(record)


@dataclass(slots=True)
class _Teller:
    """Makes events of a number of bytes."""

    name: str
    stored: StoredObject
    emit: Emit
    began: float = field(default_factory=time.monotonic)
    n_first: int | None = None

    def __call__(self, n_bytes: int) -> None:
        if self.n_first is None:
            self.n_first = n_bytes
        elapsed_s = time.monotonic() - self.began
        bytes_per_s = (n_bytes - self.n_first) / elapsed_s if elapsed_s else 0.0
        self.emit(
            Fetching(
                model=self.name,
                source=self.stored.url,
                n_bytes=n_bytes,
                total_bytes=self.stored.n_bytes,
                elapsed_s=round(elapsed_s, 2),
                bytes_per_s=round(bytes_per_s),
            )
        )

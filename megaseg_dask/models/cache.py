"""Models kept on this machine: a folder for each, with the bundle's file and a record of it.

A model gets its name by one rename, after its bundle was read and its digest recorded. A bundle
that does not have that digest any more is refused.
"""

import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from megaseg_dask.errors import BundleError
from megaseg_dask.models.bundle import Bundle, BundleFacts
from megaseg_dask.models.cards import MEGASEG_VOXEL_SIZE_UM, PUBLISHED_CARDS
from megaseg_dask.models.cytodl.files import folder_around, read_parts
from megaseg_dask.models.cytodl.read import load_bundle
from megaseg_dask.models.cytodl.safe_loading import open_zip, short
from megaseg_dask.models.facts import read_facts
from megaseg_dask.models.home import HOME, home, sha256_of, writing

Facts = TypeVar("Facts", bound=BundleFacts)

RECORD = "record.json"
FORMS = (".zip", ".ckpt")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_RENAMES = 100


# -- names and records


def is_name(text: str) -> bool:
    """Return whether a model may be called so: its name is a folder's, and no path or file."""
    is_reserved = text.endswith((".", *FORMS)) or text.casefold() == "starter"
    return bool(_NAME.fullmatch(text)) and not is_reserved


def require_name(text: str) -> None:
    """Check that a model may be called so.

    Raises:
        BundleError: It may not.
    """
    if not is_name(text):
        raise BundleError(
            f"a model cannot be called {short(text)}: expected up to 64 letters, digits, '.', '-' "
            "and '_', not the name of a .zip or .ckpt, and not starter"
        )


@dataclass(frozen=True, slots=True)
class Record:
    """Where a model came from, the SHA-256 of its file, and the digest of the bundle in it.

    ``voxel_size_um`` (z, y, x) is the size that was stated when it was imported.
    """

    name: str
    file: str
    source: str
    sha256: str
    n_bytes: int
    digest: str
    date: str
    version: str = ""
    voxel_size_um: tuple[float, float, float] | None = None

    @property
    def path(self) -> Path:
        """The bundle's file."""
        return folder_of(self.name) / self.file


def folder_of(name: str) -> Path:
    """Return the folder of a model; raises `BundleError` for what is no name."""
    require_name(name)
    return home() / "models" / name


def read_record(name: str) -> Record | None:
    """Return what is recorded of a model; None if it is not in the cache.

    Raises:
        BundleError: The record is broken, or cannot be read.
    """
    path = folder_of(name) / RECORD
    try:
        content = json.loads(path.read_bytes())
        values = {field.name: content[field.name] for field in fields(Record)[:-1]}
        record = Record(**values, voxel_size_um=_size_of(content.get("voxel_size_um")))
        # The file is opened by this name.
        if record.name != name or record.file not in [name + form for form in FORMS]:
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged; {_get_again(name)}") from error
    return record


def _size_of(value: object) -> tuple[float, float, float] | None:
    """Return the recorded size of voxels; older records have none."""
    if value is None:
        return None
    z, y, x = map(float, value)  # type: ignore[call-overload]
    return z, y, x


def cached_names() -> list[str]:
    """Return the names of the models in the cache, sorted.

    Raises:
        BundleError: The cache cannot be read.
    """
    cache = home() / "models"
    try:
        folders = [path for path in cache.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(cache, error) from error
    return sorted(path.name for path in folders if is_name(path.name))


def _unreadable(path: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{path} cannot be read: {error.strerror}; set {HOME} to a folder that you can read"
    )


# -- reading


def read_cached_facts(record: Record, checkpoint: str | None = None) -> BundleFacts:
    """Return the facts of a model of the cache, or of another of its checkpoints.

    Raises:
        BundleError: It is not what was recorded.
    """
    _require_file(record)
    facts = read_facts(record.path, checkpoint)
    _require_recorded(record, facts, checkpoint)
    return _with_voxel_size(facts, record)


def _with_voxel_size(facts: Facts, record: Record) -> Facts:
    """Return facts with the size of voxels: as imported, of the bundle, or as published."""
    if record.voxel_size_um:
        origin = "given when it was imported"
        size = record.voxel_size_um
    elif record.name in PUBLISHED_CARDS and facts.voxel_size_um is None:
        origin = "published"
        size = MEGASEG_VOXEL_SIZE_UM
    else:
        return facts
    origins = {**facts.origins, "voxel_size_um": origin}
    return replace(facts, voxel_size_um=size, origins=origins)


def load_cached(record: Record, checkpoint: str | None = None) -> Bundle:
    """Load a model of the cache, or another of its checkpoints.

    Raises:
        BundleError: It is not what was recorded.
    """
    _require_file(record)
    bundle = load_bundle(record.path, checkpoint)
    _require_recorded(record, bundle, checkpoint)
    return _with_voxel_size(bundle, record)


def _require_file(record: Record) -> None:
    if not record.path.is_file():
        raise BundleError(
            f"{record.path} is missing, but its record exists; {_get_again(record.name)}"
        )


def _require_recorded(record: Record, facts: BundleFacts, checkpoint: str | None) -> None:
    # The recorded digest is that of the checkpoint taken by default; for another, the file's must
    # do.
    kind = "digest"
    found = facts.digest
    recorded = record.digest
    if checkpoint is not None:
        kind = "SHA-256"
        found = sha256_of(record.path)
        recorded = record.sha256
    if found != recorded:
        raise BundleError(
            f"{record.path} has {kind} {found[:12]}, its record says {recorded[:12]}; "
            f"{_get_again(record.name)}"
        )


def _get_again(name: str) -> str:
    return (
        f"get it again with `megaseg models fetch {name} --overwrite`, or import with --overwrite"
    )


# -- writing


def install(
    name: str,
    form: str,
    fill: Callable[[Path], None],
    *,
    source: str,
    version: str = "",
    voxel_size_um: tuple[float, float, float] | None = None,
) -> Record:
    """Give a bundle its name in the cache, in place of one that has it; returns its record.

    ``fill`` writes the bundle's file, which is a ``.zip`` or ``.ckpt``, as ``form`` says.

    Raises:
        BundleError: It is not a whole bundle that can be run; the cache stays as it was.
        SettingsError: The cache is not a folder that this user can write.
        StoreError: Writing failed.
    """
    target = folder_of(name)
    staging = target.with_name(f".{name}-{uuid.uuid4().hex[:8]}")
    with writing(name):
        staging.mkdir(parents=True)
        try:
            path = staging / f"{name}{form}"
            fill(path)
            record = Record(
                name=name,
                file=path.name,
                source=source,
                sha256=sha256_of(path),
                n_bytes=path.stat().st_size,
                digest=_read_whole(path).digest,
                date=datetime.now(UTC).isoformat(timespec="seconds"),
                version=version,
                voxel_size_um=voxel_size_um,
            )
            (staging / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n")
            for file in (path, staging / RECORD):
                _sync(file)
            _replace(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return record


def _read_whole(path: Path) -> BundleFacts:
    """Read a bundle, and every other byte of its zip too."""
    try:
        if zipfile.is_zipfile(path):
            with open_zip(path) as archive:
                if damaged := archive.testzip():
                    raise BundleError(f"{short(damaged)} in it is damaged")
        return read_facts(path)
    except BundleError as error:
        # The path is only where it lies for the moment.
        raise BundleError(str(error).removeprefix(f"{path}: ")) from error
    except OSError:
        raise
    # Each decompressor raises its own errors.
    except Exception as error:
        raise BundleError(f"the zip is damaged ({short(str(error))})") from error


def _replace(staging: Path, target: Path) -> None:
    """Rename a folder to one that may exist, which is moved away and removed."""
    old = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.old")
    for _ in range(_MAX_RENAMES):
        try:
            staging.rename(target)
            return
        except OSError:
            # Of two processes at once one comes second; it finds the other's folder.
            if not target.exists():
                raise
        with suppress(FileNotFoundError):
            target.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    raise OSError(f"{target} is replaced by others all the time")


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def import_bundle(
    path: Path,
    name: str,
    *,
    checkpoint: str | None = None,
    voxel_size_um: tuple[float, float, float] | None = None,
    overwrite: bool = False,
) -> Record:
    """Copy a bundle into the cache under a name.

    A zip or .ckpt is copied as it is, of a folder what is needed to run it. ``voxel_size_um``
    (z, y, x) is that of the images that it was trained on.

    Raises:
        BundleError: The name is taken and not to be overwritten, or it is no bundle.
    """
    require_name(name)
    if not overwrite and folder_of(name).exists():
        raise BundleError(
            f"{name} is already in the cache; choose another name, or pass --overwrite to replace "
            "it"
        )
    if not path.exists():
        raise BundleError(f"{path} does not exist; give a bundle's folder, its zip or a .ckpt")
    # What is wrong with it is said of the path that was given.
    digest = read_facts(path, checkpoint).digest
    is_choice = checkpoint is not None and path.suffix == ".zip"
    is_packed = path.is_dir() or folder_around(path) is not None or is_choice

    def fill(target: Path) -> None:
        if not is_packed:
            shutil.copyfile(path, target)
            return
        with zipfile.ZipFile(target, "w") as archive:
            for file, data in read_parts(path, checkpoint):
                archive.writestr(file, data)

    form = ".zip" if is_packed or path.suffix == ".zip" else ".ckpt"
    source = str(path.absolute())
    record = install(name, form, fill, source=source, voxel_size_um=voxel_size_um)
    assert record.digest == digest
    return record

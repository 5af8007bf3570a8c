"""Files of a bundle, read as data: a folder, a zip of it, or a bare checkpoint.

Nothing in them is trusted. Checkpoints load with ``weights_only=True``; a zip is
checked entry by entry and never unpacked to disk; sizes have limits. What the
files say is for :mod:`megaseg_dask.models.cytodl` to judge.
"""

import io
import re
import stat
import zipfile
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import Any, TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.models.bundle import first_few

Place: TypeAlias = Path | zipfile.Path

MAX_BYTES = 8 * 2**30  # forty times the largest published checkpoint
MAX_RATIO = 100  # trained weights hardly compress
RATIO_FROM_BYTES = 100 * 2**20  # below this a high ratio does no harm


class _Short(Repr):
    """Prints a foreign value in part: a short file can describe one without end."""

    def repr_instance(self, value: object, level: int) -> str:
        plain = isinstance(value, bool | float | None)
        return repr(value) if plain else f"<{type(value).__name__}>"


_SHORT = _Short()
_SHORT.maxstring, _SHORT.maxlevel = 100, 2
short = _SHORT.repr


def read_files(path: Path, checkpoint: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parsed train_config.yaml (empty without one) and the checkpoint's content."""
    if path.is_dir():
        return _read_layout(path, checkpoint)
    if not path.is_file():
        raise BundleError("no such file or folder; give a bundle's folder, its zip or a .ckpt")
    if zipfile.is_zipfile(path):
        with _open_zip(path) as archive:
            if not _is_torch_archive(archive):
                return _read_layout(zipfile.Path(archive), checkpoint)
    if checkpoint not in (None, path.name, path.stem):
        raise BundleError(f"this is one checkpoint, not a folder with one named {checkpoint}")
    return {}, _read_checkpoint(path)


def _is_torch_archive(archive: zipfile.ZipFile) -> bool:
    # torch's own format is a zip as well: one folder with the pickle data.pkl.
    return any(PurePosixPath(name).match("*/data.pkl") for name in archive.namelist())


def _open_zip(file: Path | io.BytesIO) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BundleError(f"the zip is damaged ({short(str(error))}); fetch it again") from error
    for entry in archive.infolist():
        if danger := _danger(entry):
            raise BundleError(f"zip entry {short(entry.filename)} {danger}; this zip is not safe and was not read")
    total = sum(entry.file_size for entry in archive.infolist())
    if total > MAX_BYTES:
        raise BundleError(f"the zip unpacks to {total} bytes; at most {MAX_BYTES} are read")
    return archive


def _danger(entry: zipfile.ZipInfo) -> str:
    parts = entry.filename.removesuffix("/").split("/")
    if not {"", ".", ".."}.isdisjoint(parts) or "\\" in entry.filename or ":" in entry.filename:
        return "points outside its folder"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if entry.file_size > max(RATIO_FROM_BYTES, MAX_RATIO * entry.compress_size):
        return f"grows from {entry.compress_size} to {entry.file_size} bytes"
    return ""


def _read_layout(top: Place, checkpoint: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    root = _find_root(top)
    file = _choose([file for file in (root / "checkpoints").iterdir() if _is_checkpoint(file)], checkpoint)
    config = root / "train_config.yaml"
    return (_read_yaml(config) if config.is_file() else {}), _read_checkpoint(file)


def _is_checkpoint(file: Place) -> bool:
    return file.name.endswith(".ckpt") and not file.name.startswith(".") and file.is_file()


def _find_root(top: Place) -> Place:
    if (top / "checkpoints").is_dir():
        return top
    # Zips made on a Mac carry a second tree, __MACOSX, without content.
    below = (child for child in top.iterdir() if child.is_dir() and child.name != "__MACOSX")
    roots: list[Place] = [child for child in below if (child / "checkpoints").is_dir()]
    if len(roots) != 1:
        names = first_few(root.name for root in roots) or "none"
        raise BundleError(f"expected one folder with checkpoints/*.ckpt, here or one level deeper; found {names}")
    return roots[0]


def _choose(files: list[Place], wanted: str | None) -> Place:
    if wanted is not None:
        candidates = [file for file in files if file.name in (wanted, f"{wanted}.ckpt")]
    elif len(files) == 1:
        candidates = files
    else:
        candidates = sorted((f for f in files if _epoch(f.name)), key=lambda f: _epoch(f.name))
    if not candidates:
        asked = f"no checkpoint {wanted}" if wanted else "no checkpoint that names its epoch"
        raise BundleError(f"{asked}; there are: {first_few((file.name for file in files), 10) or 'none'}")
    return candidates[-1]


def _epoch(name: str) -> tuple[int, int] | tuple[()]:
    """Epoch, and version of the file; nothing for last.ckpt. Lightning writes both ``_`` and ``=``."""
    match = re.search(r"epoch[_=]?(\d+)(?:.*-v(\d+))?", name)
    return (int(match[1]), int(match[2] or 0)) if match else ()


def _read_bytes(file: Place) -> bytes:
    if isinstance(file, Path) and file.stat().st_size > MAX_BYTES:
        raise BundleError(f"{file.name} has {file.stat().st_size} bytes, at most {MAX_BYTES} are read")
    try:
        return file.read_bytes()
    except OSError:
        raise
    # Each decompressor has errors of its own, and an encrypted entry is a RuntimeError.
    except Exception as error:
        raise BundleError(f"{file.name} cannot be read ({short(str(error))}); fetch the zip again") from error


def _read_yaml(file: Place) -> dict[str, Any]:
    import yaml

    data = _read_bytes(file)
    try:
        config = yaml.safe_load(data)
    # Beside YAMLError, a scalar that claims a type it is not of raises what that type raises.
    except Exception as error:
        raise BundleError(f"{file.name} is not YAML ({short(str(error))}); fetch it again or remove it") from error
    if not isinstance(config, dict):
        raise BundleError(f"{file.name} is not a configuration but {short(config)}; fetch it again or remove it")
    return config


def _read_checkpoint(file: Place) -> dict[str, Any]:
    import torch

    stream = io.BytesIO(_read_bytes(file))
    if zipfile.is_zipfile(stream):
        _open_zip(stream).close()
    stream.seek(0)
    try:
        content = torch.load(stream, map_location="cpu", weights_only=True)
    # Bytes that are no checkpoint fail in the unpickler as anything from KeyError to RuntimeError.
    except Exception as error:
        raise BundleError(f"{file.name} {_why_not_loaded(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        found = first_few(content) if isinstance(content, dict) else type(content).__name__
        raise BundleError(f"{file.name} is not a Lightning checkpoint: expected a state_dict, found {found}")
    return content


def _why_not_loaded(error: Exception) -> str:
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return f"pickles {match[1]:.80}, neither a tensor nor a plain value; it is not safe and was not loaded"
    return "is not a checkpoint, or not a whole one; fetch it again"

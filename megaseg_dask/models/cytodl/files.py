"""Files of a bundle, read as data: a folder, a zip of it, or a bare checkpoint.

Nothing in them is trusted, see :mod:`megaseg_dask.models.cytodl.safe_loading`. A zip is read
in place and never unpacked to disk, checkpoints load with ``weights_only=True``.
What the files say is for :mod:`megaseg_dask.models.cytodl.read` to judge.
"""

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from megaseg_dask.errors import BundleError
from megaseg_dask.messages import first_few, one_line
from megaseg_dask.models.cytodl import safe_loading
from megaseg_dask.models.cytodl.safe_loading import Unsafe, open_zip, short

Place: TypeAlias = Path | zipfile.Path

CONFIG = "train_config.yaml"


@dataclass(frozen=True, slots=True)
class Files:
    """What the files of a bundle say, parsed and not yet judged.

    ``config`` is train_config.yaml, empty without one; ``content`` is the checkpoint
    of file name ``checkpoint``, and ``reason`` says why that one was taken.
    """

    config: dict[str, Any]
    content: dict[str, Any]
    checkpoint: str
    reason: str


def read_files(path: Path, checkpoint: str | None) -> Files:
    """Read a bundle of any form; of several checkpoints the one of that name, else the newest."""
    if path.is_dir():
        return _read_layout(path, checkpoint)
    if not path.is_file():
        raise BundleError("no such file or folder; give a bundle's folder, its zip or a .ckpt")
    if (folder := layout_of(path)) and checkpoint in (None, path.name, path.stem):
        return _read_layout(folder, path.name)
    if zipfile.is_zipfile(path):
        try:
            with open_zip(path) as archive:
                if not _is_torch_archive(archive):
                    return _read_layout(zipfile.Path(archive), checkpoint)
        except zipfile.BadZipFile as error:
            raise BundleError(
                f"the zip is damaged ({short(str(error))}); fetch it again"
            ) from error
    if checkpoint not in (None, path.name, path.stem):
        raise BundleError(
            f"this is one checkpoint, not a folder with one named {one_line(checkpoint)}"
        )
    return Files({}, _read_checkpoint(path), one_line(path.name), "the file itself")


def _is_torch_archive(archive: zipfile.ZipFile) -> bool:
    # torch's own format is a zip as well: one folder with the pickle data.pkl.
    return any(PurePosixPath(name).match("*/data.pkl") for name in archive.namelist())


def _read_layout(top: Place, checkpoint: str | None) -> Files:
    config, file, reason = _find_parts(top, checkpoint)
    return Files(
        _read_yaml(config) if config.exists() else {},
        _read_checkpoint(file),
        one_line(file.name),
        reason,
    )


def _find_parts(top: Place, checkpoint: str | None) -> tuple[Place, Place, str]:
    """The configuration, which may be missing, the checkpoint to load, and why that one."""
    root = _find_root(top)
    file, reason = _choose(
        [file for file in (root / "checkpoints").iterdir() if _is_checkpoint(file)], checkpoint
    )
    return root / CONFIG, file, reason


def layout_of(path: Path) -> Path | None:
    """The folder of the bundle to which a checkpoint in it belongs, if a configuration is there too.

    How images are prepared stands in that alone, and must not be lost by naming the checkpoint.
    """
    above = path.absolute().parent
    in_layout = above.name == "checkpoints" and path.suffix == ".ckpt" and path.is_file()
    return above.parent if in_layout and (above.parent / CONFIG).exists() else None


def files_of(path: Path, checkpoint: str | None) -> tuple[list[Path], str]:
    """Return the files on disk that a bundle is read from, and why its checkpoint is the one.

    Raises:
        BundleError: A folder is not laid out as a bundle.

    """
    if folder := layout_of(path):
        path, checkpoint = folder, path.name
    if not path.is_dir():
        return [path], ""
    config, file, reason = _find_parts(path, checkpoint)
    files = [config, file] if config.exists() else [file]
    return [Path(str(each)) for each in files], reason


def parts_of(path: Path, checkpoint: str | None) -> Iterator[tuple[str, bytes]]:
    """Path in its layout and content of what is needed to run the bundle in a folder or its zip, not yet judged."""
    if folder := layout_of(path):
        path, checkpoint = folder, path.name
    with open_zip(path) if path.is_file() else nullcontext() as archive:
        config, file, _ = _find_parts(zipfile.Path(archive) if archive else path, checkpoint)
        if config.is_file():
            yield CONFIG, _read_bytes(config, safe_loading.MAX_YAML_BYTES)
        yield f"checkpoints/{file.name}", _read_bytes(file, safe_loading.MAX_BYTES)


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
        raise BundleError(
            f"expected one folder with checkpoints/*.ckpt, here or one level deeper; found {names}"
        )
    return roots[0]


def _choose(files: list[Place], wanted: str | None) -> tuple[Place, str]:
    """The checkpoint to load, and why that one.

    The napari plugin takes the file that was modified last of those without "last" in
    their names: Lightning keeps only the best beside last.ckpt, so the newest is the
    best. Copying and unpacking change that time, so here the epoch in the name decides.
    """
    if wanted is not None:
        named = [file for file in files if file.name in (wanted, f"{wanted}.ckpt")]
        return _only(named, f"no checkpoint {one_line(wanted)}", files), "as asked for"
    best = [file for file in files if "last" not in file.name.lower()] or files
    if len(best) == 1:
        reason = "the only one" if len(files) == 1 else "the only one beside last.ckpt"
        return best[0], reason
    newest = max(map(_epoch, best), default=())
    first = [file for file in best if newest and _epoch(file) == newest]
    problem = "no checkpoint that names its epoch" if not newest else "several of the newest epoch"
    return _only(first, problem, files), f"the highest epoch of {len(best)}"


def _only(found: list[Place], problem: str, files: list[Place]) -> Place:
    if len(found) != 1:
        names = first_few((file.name for file in files), 10) or "none"
        raise BundleError(f"{problem}; there are: {names}; choose one with --checkpoint")
    return found[0]


def _epoch(file: Place) -> tuple[int, int] | tuple[()]:
    """Epoch, and version of the file; nothing without one. Lightning writes both ``_`` and ``=``."""
    match = re.search(r"epoch[_=]?(\d{1,9})(?:.*-v(\d{1,9}))?", file.name)
    return (int(match[1]), int(match[2] or 0)) if match else ()


def _read_bytes(file: Place, limit: int) -> bytes:
    n_bytes = (
        file.stat().st_size if isinstance(file, Path) else file.root.getinfo(file.at).file_size
    )
    if n_bytes > limit:
        raise BundleError(f"{one_line(file.name)} has {n_bytes} bytes, at most {limit} are read")
    try:
        return file.read_bytes()
    except OSError:
        raise
    # Each decompressor has errors of its own.
    except Exception as error:
        raise BundleError(
            f"{one_line(file.name)} cannot be read ({short(str(error))}); fetch the zip again"
        ) from error


def _read_yaml(file: Place) -> dict[str, Any]:
    if not file.is_file():
        raise BundleError(f"{file.name} is no file; expected a configuration, or none")
    data = _read_bytes(file, safe_loading.MAX_YAML_BYTES)
    advice = "fetch it again or remove it"
    try:
        config = safe_loading.parse_yaml(data)
    except Unsafe as error:
        raise BundleError(
            f"{file.name} {error}; it is not safe and was not read, {advice}"
        ) from None
    # Beside YAMLError, a scalar that claims a type it is not of raises what that type raises.
    except Exception as error:
        raise BundleError(f"{file.name} is not YAML ({short(str(error))}); {advice}") from error
    if not isinstance(config, dict):
        raise BundleError(f"{file.name} is not a configuration but {short(config)}; {advice}")
    return config


def _read_checkpoint(file: Place) -> dict[str, Any]:
    import torch

    name, stream = one_line(file.name), io.BytesIO(_read_bytes(file, safe_loading.MAX_BYTES))
    try:
        _require_safe(stream)
        content = torch.load(stream, map_location="cpu", weights_only=True)
    except BundleError as error:
        raise BundleError(f"{name}: {error}") from error
    except Unsafe as error:
        raise BundleError(
            f"{name} {error}; it is not safe and was not loaded, get it from its maker"
        ) from None
    # Bytes that are no checkpoint fail in the unpickler as anything from KeyError to RuntimeError.
    except Exception as error:
        kind = "zip" if name.endswith(".zip") else "checkpoint"
        raise BundleError(f"{name} is not a {kind}, or not a whole one; fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        found = first_few(content) if isinstance(content, dict) else type(content).__name__
        raise BundleError(
            f"{name} is not a Lightning checkpoint: expected a state_dict, found {found or 'nothing'}"
        )
    return content


def _require_safe(stream: io.BytesIO) -> None:
    """Look through a checkpoint in either of torch's formats; leaves the stream at its begin."""
    declared: dict[str, int] = {}
    # By its first bytes, as torch decides.
    if stream.getvalue().startswith(b"PK\3\4"):
        with open_zip(stream) as archive:
            n_bytes = sum(entry.file_size for entry in archive.infolist())
            (pickle,) = (
                name for name in archive.namelist() if PurePosixPath(name).match("*/data.pkl")
            )
            safe_loading.inspect_pickle(io.BytesIO(archive.read(pickle)), declared)
    else:
        n_bytes = len(stream.getvalue())
        for _ in range(5):  # magic number, version, byte order, content, keys of the storages
            safe_loading.inspect_pickle(stream, declared)
    if sum(declared.values()) > n_bytes:
        raise Unsafe(f"claims tensors of {sum(declared.values())} values in {n_bytes} bytes")
    stream.seek(0)

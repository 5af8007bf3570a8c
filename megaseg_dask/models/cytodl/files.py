"""Files of a bundle, read as data: a folder, a zip of it, or a bare checkpoint.

Nothing in them is trusted, see :mod:`megaseg_dask.models.cytodl.safe_loading`. A zip is read in
place and never unpacked to disk, checkpoints load with ``weights_only=True``. Whether what the
files say can be run is for :mod:`megaseg_dask.models.cytodl.read` to judge.
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

File: TypeAlias = Path | zipfile.Path  # or a folder

CONFIG = "train_config.yaml"


@dataclass(frozen=True, slots=True)
class Files:
    """What the files of a bundle say, parsed and not yet judged.

    ``config`` is train_config.yaml, empty without one; ``content`` is the checkpoint with the file
    name ``checkpoint``, and ``reason`` says why that one was taken.
    """

    config: dict[str, Any]
    content: dict[str, Any]
    checkpoint: str
    reason: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a bundle are: ``config`` may not exist."""

    config: File
    checkpoint: File
    reason: str


def read_files(path: Path, checkpoint: str | None) -> Files:
    """Read a bundle of any form; of several checkpoints the one of that name, else the newest.

    Raises:
        BundleError: It is no bundle, or not safe to read.
    """
    if path.is_dir():
        return _read_layout(path, checkpoint)
    if not path.is_file():
        raise BundleError("no such file or folder; give a bundle's folder, its zip or a .ckpt")
    is_chosen = checkpoint in (None, path.name, path.stem)
    if (folder := folder_around(path)) and is_chosen:
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
    if not is_chosen:
        raise BundleError(
            f"this is one checkpoint, not a folder with one named {one_line(checkpoint)}"
        )
    return Files({}, _read_checkpoint(path), one_line(path.name), "the file itself")


def _is_torch_archive(archive: zipfile.ZipFile) -> bool:
    # torch's own format is a zip as well: one folder with the pickle data.pkl.
    return any(PurePosixPath(name).match("*/data.pkl") for name in archive.namelist())


def _read_layout(top: File, checkpoint: str | None) -> Files:
    layout = _find_parts(top, checkpoint)
    config = _read_yaml(layout.config) if layout.config.exists() else {}
    content = _read_checkpoint(layout.checkpoint)
    return Files(config, content, one_line(layout.checkpoint.name), layout.reason)


# -- which files


def folder_around(path: Path) -> Path | None:
    """Return the folder of the bundle to which a checkpoint belongs, if a configuration is there.

    That alone says how images are prepared, and must not be lost by naming the checkpoint.
    """
    checkpoints = path.absolute().parent
    folder = checkpoints.parent
    is_inside = checkpoints.name == "checkpoints" and path.suffix == ".ckpt" and path.is_file()
    return folder if is_inside and (folder / CONFIG).exists() else None


def files_of(path: Path, checkpoint: str | None) -> tuple[list[Path], str]:
    """Return the files on disk that a bundle is read from, and why its checkpoint is the one.

    Raises:
        BundleError: A folder is not laid out as a bundle.
    """
    if folder := folder_around(path):
        layout = _find_parts(folder, path.name)
    elif path.is_dir():
        layout = _find_parts(path, checkpoint)
    else:
        return [path], ""
    files = [file for file in (layout.config, layout.checkpoint) if file.exists()]
    return [Path(str(file)) for file in files], layout.reason


def read_parts(path: Path, checkpoint: str | None) -> Iterator[tuple[str, bytes]]:
    """Read what is needed to run the bundle in a folder or its zip, not yet judged.

    Yields the path of each file in the layout, and its content.

    Raises:
        BundleError: The folder or zip is not laid out as a bundle, or a file is too large.
    """
    folder = folder_around(path)
    if folder:
        checkpoint = path.name
        path = folder
    with open_zip(path) if path.is_file() else nullcontext() as archive:
        layout = _find_parts(zipfile.Path(archive) if archive else path, checkpoint)
        if layout.config.is_file():
            yield CONFIG, _read_bytes(layout.config, safe_loading.MAX_YAML_BYTES)
        name = f"checkpoints/{layout.checkpoint.name}"
        yield name, _read_bytes(layout.checkpoint, safe_loading.MAX_BYTES)


def _find_parts(top: File, checkpoint: str | None) -> Layout:
    root = _find_root(top)
    files = [file for file in (root / "checkpoints").iterdir() if _is_checkpoint(file)]
    file, reason = _choose(files, checkpoint)
    return Layout(root / CONFIG, file, reason)


def _is_checkpoint(file: File) -> bool:
    return file.name.endswith(".ckpt") and not file.name.startswith(".") and file.is_file()


def _find_root(top: File) -> File:
    if (top / "checkpoints").is_dir():
        return top
    # Zips made on a Mac carry a second tree, __MACOSX, without content.
    folders = [file for file in top.iterdir() if file.is_dir() and file.name != "__MACOSX"]
    roots = [folder for folder in folders if (folder / "checkpoints").is_dir()]
    if len(roots) != 1:
        names = first_few(root.name for root in roots) or "none"
        raise BundleError(
            f"expected one folder with checkpoints/*.ckpt, here or one level deeper; found {names}"
        )
    return roots[0]


def _choose(files: list[File], name: str | None) -> tuple[File, str]:
    """Return the checkpoint to load, and why that one.

    The napari plugin takes the file that was modified last of those without "last" in their names:
    Lightning keeps only the best beside last.ckpt, so the newest is the best. Copying and unpacking
    change that time. So the loss decides if the names state it, else what Lightning recorded as the
    best, else the epoch in the name.
    """
    if name is not None:
        same_name = [file for file in files if file.name in (name, f"{name}.ckpt")]
        return _only(same_name, f"no checkpoint {one_line(name)}", files), "as asked for"
    best = [file for file in files if "last" not in file.name.lower()] or files
    if len(files) == 1:
        return best[0], "the only one"
    if len(best) == 1:
        return best[0], "the only one beside last.ckpt"
    losses = [loss for loss in map(_loss, best) if loss is not None]
    if best and len(losses) == len(best):
        of_least = [file for file in best if _loss(file) == min(losses)]
        return max(of_least, key=_epoch), f"the least loss in the names of {len(best)}"
    if best and (recorded := _recorded_as_best(files, best)):
        return recorded, f"recorded as the best of {len(best)}"
    newest = max(map(_epoch, best), default=())
    problem = "several of the newest epoch" if newest else "no checkpoint that names its epoch"
    first = [file for file in best if newest and _epoch(file) == newest]
    return _only(first, problem, files), f"the highest epoch of {len(best)}"


def _only(chosen: list[File], problem: str, files: list[File]) -> File:
    if len(chosen) != 1:
        names = first_few((file.name for file in files), 10) or "none"
        raise BundleError(f"{problem}; there are: {names}; choose one with --checkpoint")
    return chosen[0]


def _loss(file: File) -> float | None:
    """Return the loss that a file's name states, such as ``epoch=12-val_loss=0.034.ckpt``."""
    number = r"loss[=_](\d+(?:\.\d+)?(?:e-?\d+)?)"
    # A name may have the loss of training too, which says nothing about new images.
    match = re.search(rf"val[a-z]*[_-]?{number}", file.name) or re.search(number, file.name)
    return float(match[1]) if match else None


def _recorded_as_best(files: list[File], best: list[File]) -> File | None:
    """Return the file that Lightning's callback recorded as the best in the newest checkpoint."""
    last = [file for file in files if file not in best]
    newest = last or sorted(best, key=_epoch)
    data = _read_bytes(newest[-1], safe_loading.MAX_BYTES)
    path = safe_loading.text_in_checkpoint(data, "best_model_path")
    # The path is of the machine that trained, also of one with the other slashes.
    name = re.split(r"[/\\]", path or "")[-1]
    return next((file for file in best if file.name == name), None)


def _epoch(file: File) -> tuple[int, ...]:
    """Return epoch and version of a file, or nothing. Lightning writes both ``_`` and ``=``."""
    match = re.search(r"epoch[_=]?(\d{1,9})(?:.*-v(\d{1,9}))?", file.name)
    return (int(match[1]), int(match[2] or 0)) if match else ()


# -- what is in them


def _read_bytes(file: File, max_bytes: int) -> bytes:
    if isinstance(file, Path):
        n_bytes = file.stat().st_size
    else:
        n_bytes = file.root.getinfo(file.at).file_size
    if n_bytes > max_bytes:
        raise BundleError(
            f"{one_line(file.name)} has {n_bytes} bytes, at most {max_bytes} are read"
        )
    try:
        return file.read_bytes()
    except OSError:
        raise
    # Each decompressor raises its own errors.
    except Exception as error:
        raise BundleError(
            f"{one_line(file.name)} cannot be read ({short(str(error))}); fetch the zip again"
        ) from error


def _read_yaml(file: File) -> dict[str, Any]:
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


def _read_checkpoint(file: File) -> dict[str, Any]:
    # torch takes a second to import: a process that finds a record does without it.
    import torch

    name = one_line(file.name)
    stream = io.BytesIO(_read_bytes(file, safe_loading.MAX_BYTES))
    try:
        safe_loading.require_safe_checkpoint(stream)
        content = torch.load(stream, map_location="cpu", weights_only=True)
    except BundleError as error:
        raise BundleError(f"{name}: {error}") from error
    except Unsafe as error:
        raise BundleError(
            f"{name} {error}; it is not safe and was not loaded, get it from its maker"
        ) from None
    # Bytes that are no checkpoint fail in the unpickler as anything from KeyError to RuntimeError.
    except Exception as error:
        form = "zip" if name.endswith(".zip") else "checkpoint"
        raise BundleError(f"{name} is not a {form}, or not a whole one; fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        keys = first_few(content) if isinstance(content, dict) else type(content).__name__
        raise BundleError(
            f"{name} is not a Lightning checkpoint: expected a state_dict, found "
            f"{keys or 'nothing'}"
        )
    return content

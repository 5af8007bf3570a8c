"""A table of hostile bundles.

Each ends as one line that names file, cause and what to do, and does nothing else.

``python -m tests.models.test_hostile_bundles`` writes the table into docs/bundles.md.
"""

import copy
import io
import itertools
import os
import pickle
import re
import stat
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megaseg_dask.cli.app import main
from megaseg_dask.errors import BundleError
from megaseg_dask.models import load_bundle, read_bundle
from tests.fixtures.bundles import (
    backbone,
    checkpoint_content,
    train_config,
    write_checkpoint,
    write_folder,
    write_zip,
)
from tests.fixtures.images import write_image

DOC = Path(__file__).parents[2] / "docs" / "bundles.md"
MARKER = "hostile-was-here"
SCALE = "backbone.input_block.norm1.weight"


class Case(NamedTuple):
    """A bundle, how to make it in a folder, and what its refusal must say."""

    name: str
    make: Callable[[Path], Path]
    message: str


# --- makers


def saved(content: object, **options) -> Callable[[Path], Path]:
    """A checkpoint of any content, as torch writes it."""

    def make(folder: Path) -> Path:
        torch.save(content() if callable(content) else content, folder / "a.ckpt", **options)
        return folder / "a.ckpt"

    return make


def weights(**edits) -> Callable[[Path], Path]:
    """A checkpoint with some of its weights replaced, by key without the prefix."""

    def content() -> dict:
        whole = checkpoint_content(aliases=False)
        whole["state_dict"] |= {f"backbone.{key}": value for key, value in edits.items()}
        return whole

    return saved(content)


def written(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.ckpt").write_bytes(data)
        return folder / "a.ckpt"

    return make


def configured(config: str | dict) -> Callable[[Path], Path]:
    """A folder whose checkpoint is fine and has no hyperparameters, with this train_config.yaml."""

    def make(folder: Path) -> Path:
        bundle = write_folder(folder / "x", hyper_parameters=False)
        text = config if isinstance(config, str) else yaml.safe_dump(config)
        (bundle / "train_config.yaml").write_text(text)
        return bundle

    return make


def changed(path: str, value: object) -> Callable[[Path], Path]:
    """A folder with the usual train_config.yaml, in which one value is another."""
    config = train_config()
    *parents, last = path.split(".")
    section = config
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    return configured(config)


def zipped(edit: Callable[[zipfile.ZipFile], None]) -> Callable[[Path], Path]:
    """The zip of a good bundle, changed before its directory is written."""

    def make(folder: Path) -> Path:
        path = write_zip(folder / "a.zip")
        with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
            warnings.simplefilter("ignore")
            edit(archive)
        return path

    return make


def entry(name: str, *, kind: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    return info


def adds(name: str, data: bytes = b"", **options) -> Callable[[zipfile.ZipFile], None]:
    return lambda archive: archive.writestr(entry(name, **options), data)


def claims(n_entries: int, n_bytes: int) -> Callable[[zipfile.ZipFile], None]:
    """Entries that say how large they become, without being it."""

    def edit(archive: zipfile.ZipFile) -> None:
        for i in range(n_entries):
            archive.writestr(f"megaSeg/{i}", b"x" * 100)
            archive.filelist[-1].file_size = n_bytes

    return edit


def crowds(archive: zipfile.ZipFile) -> None:
    for i in range(10_001):
        archive.writestr(f"megaSeg/{i}", b"")


def overlaps(archive: zipfile.ZipFile) -> None:
    """Entries of the same bytes: many of them make much out of little."""
    archive.writestr("megaSeg/x", b"")
    for i in range(3):
        twin = copy.copy(max(archive.filelist, key=lambda info: info.compress_size))
        twin.filename = twin.orig_filename = f"megaSeg/twin{i}"
        archive.filelist.append(twin)


def encrypts(archive: zipfile.ZipFile) -> None:
    archive.writestr("megaSeg/x", b"")
    archive.filelist[-1].flag_bits |= 1


def damaged(folder: Path) -> Path:
    path = write_zip(folder / "a.zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("megaSeg/train_config.yaml").header_offset
    data[start + 60 : start + 90] = bytes(30)
    path.write_bytes(data)
    return path


def bomb_in_checkpoint(folder: Path) -> Path:
    path = write_checkpoint(folder / "a.ckpt")
    with zipfile.ZipFile(path, "a") as archive:
        claims(3, 100 * 2**20)(archive)
    return path


def half(folder: Path) -> Path:
    path = write_checkpoint(folder / "a.ckpt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def sparse(folder: Path) -> Path:
    with (folder / "a.ckpt").open("wb") as file:
        file.truncate(5 * 2**30)
    return folder / "a.ckpt"


def piped_config(folder: Path) -> Path:
    bundle = write_folder(folder / "x", hyper_parameters=False)
    (bundle / "train_config.yaml").unlink()
    os.mkfifo(bundle / "train_config.yaml")
    return bundle


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.ckpt")
    return folder / "a.ckpt"


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def claimed_storage() -> bytes:
    """In torch's old format a file says how much to allocate before it is read."""
    stream = io.BytesIO()
    torch.save(
        {"state_dict": {"a": torch.arange(4.0)}}, stream, _use_new_zipfile_serialization=False
    )
    before, after = stream.getvalue().split(b"K\x04Nt", 1)
    return before + b"\x8a\x06" + (2**40).to_bytes(6, "little") + b"Nt" + after


def tuple_bomb() -> tuple:
    """Forty pairs, each of the one before twice: to hash it takes for ever."""
    pair: tuple = (0, 0)
    for _ in range(40):
        pair = (pair, pair)
    return pair


def of_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    return {
        "state_dict": {
            f"backbone.{key}.conv.weight": torch.ones(shape) for key, shape in shapes.items()
        }
    }


WIDE = dict.fromkeys(
    ("input_block.conv1", "downsamples.0.conv1", "bottleneck.conv1"), (20_000, 1, 1, 1, 1)
) | {
    "upsamples.0.transp_conv": (1, 1, 2, 2, 2),
    "upsamples.1.transp_conv": (1, 1, 2, 2, 2),
    "output_block.conv": (1, 1, 1, 1, 1),
}
DEEP = {f"upsamples.{i}.transp_conv": (1, 1, 1, 1, 1) for i in range(1000)}


def doubling(first: str, then: str) -> str:
    """YAML of fourteen lines, in which each is nine times the one before."""
    lines = [f"a: &a {first}"]
    for before, letter in itertools.pairwise("abcdefghijklmn"):
        lines.append(f"{letter}: &{letter} " + then.replace("NINE", ", ".join([f"*{before}"] * 9)))
    return "\n".join(lines)


# --- the table


CASES = [
    # pickles
    Case(
        "a checkpoint whose hyperparameters call os.system",
        saved(
            lambda: {
                **checkpoint_content(),
                "hyper_parameters": {"x": Runs(os.system, f"touch {MARKER}")},
            }
        ),
        "a.ckpt pickles posix.system, neither a plain tensor nor a plain value; "
        "it is not safe and was not loaded",
    ),
    Case(
        "a plain pickle that calls os.system",
        written(pickle.dumps(Runs(os.system, f"touch {MARKER}"))),
        "a.ckpt is pickled with protocol 4; torch.save writes 2, and only that is loaded",
    ),
    Case(
        "the same in pickle's oldest protocol",
        written(f"cos\nsystem\n(S'touch {MARKER}'\ntR.".encode()),
        "a.ckpt pickles os.system, neither a plain tensor nor a plain value",
    ),
    Case(
        "a pickled object that imports a module",
        saved({"state_dict": {}, "x": Path("/")}),
        # Python 3.13 alone has it in another module.
        f"a.ckpt pickles {PosixPath.__module__}.PosixPath, "
        "neither a plain tensor nor a plain value",
    ),
    Case(
        "a call that allocates a terabyte",
        saved(lambda: {"state_dict": {}, "x": Runs(bytearray, 10**12)}),
        "a.ckpt pickles __builtin__.bytearray, neither a plain tensor nor a plain value",
    ),
    Case(
        "a storage of 2^40 values in a small file",
        written(claimed_storage()),
        "a.ckpt claims tensors of 1099511627776 values in ",
    ),
    Case(
        "a tuple that takes for ever to hash",
        saved(lambda: {"state_dict": {}, "x": [tuple_bomb()]}),
        "a.ckpt pickles a tuple that unfolds to more than 1000 values",
    ),
    Case(
        "a million and more pickle operations",
        written(b"\x80\x02" + b"N" * 1_100_000 + b"."),
        "a.ckpt is a pickle of more than 1000000 operations",
    ),
    Case(
        "a checkpoint of 5 GiB", sparse, "a.ckpt has 5368709120 bytes, at most 4294967296 are read"
    ),
    Case(
        "a named pipe", pipe, "no such file or folder; give a bundle's folder, its zip or a .ckpt"
    ),
    Case(
        "an empty file",
        written(b""),
        "a.ckpt is not a checkpoint, or not a whole one; fetch it again",
    ),
    Case(
        "half a checkpoint", half, "a.ckpt is not a checkpoint, or not a whole one; fetch it again"
    ),
    Case("a zip bomb inside the checkpoint", bomb_in_checkpoint, "a.ckpt: the zip grows from "),
    # weights
    Case(
        "weights without values (meta tensors)",
        saved(lambda: {"state_dict": {SCALE: torch.ones(4, device="meta")}}),
        "pickles torch._utils._rebuild_meta_tensor_no_storage, neither a plain tensor",
    ),
    Case(
        "one stored value that claims to be 10^18",
        weights(
            **{
                "input_block.conv1.conv.weight": torch.ones(1).expand(
                    10**6, 10**6, 10**2, 10**2, 10**2
                )
            }
        ),
        "input_block.conv1.conv.weight is not a plain tensor of floats",
    ),
    Case(
        "weights that are integers",
        weights(**{"input_block.norm1.weight": torch.ones(4, dtype=torch.int64)}),
        "input_block.norm1.weight is not a plain tensor of floats (torch.int64",
    ),
    Case(
        "weights with NaN",
        weights(**{"input_block.norm1.weight": torch.full((4,), float("nan"))}),
        "input_block.norm1.weight holds NaN or infinity; "
        "the training diverged, take an earlier checkpoint",
    ),
    Case(
        "weights beyond float32",
        weights(**{"input_block.norm1.weight": torch.full((4,), 1e300, dtype=torch.float64)}),
        "input_block.norm1.weight holds NaN or infinity",
    ),
    Case(
        "weights of another shape",
        weights(**{"input_block.norm1.weight": torch.ones(5)}),
        "input_block.norm1.weight has shape (5,), the network needs (4,)",
    ),
    Case(
        "weights of another network",
        saved({"state_dict": {"backbone.encoder.weight": torch.ones(3, 3)}}),
        "the weights are not of a DynUNet, which alone is run: no input_block.conv1.conv.weight",
    ),
    Case(
        "weights that nothing uses",
        weights(extra=torch.ones(1)),
        "the weights do not fit the network, keys: 1 unexpected (extra)",
    ),
    Case(
        "a network of 10^10 parameters",
        saved(lambda: of_shapes(WIDE)),
        "a network of 10800440001 parameters; at most 268435456 are run",
    ),
    Case(
        "a network of 1001 levels",
        saved(lambda: of_shapes(DEEP)),
        "the weights are of 1001 levels; at most 10",
    ),
    Case(
        "names that move the cursor",
        saved({"state_dict": {"\x1b[2J\n" + "x" * 900: torch.ones(1)}}),
        "weights outside the backbone (?[2J xxx",
    ),
    # zips
    Case(
        "a zip entry above its folder",
        zipped(adds("../x")),
        "zip entry '../x' points outside its folder",
    ),
    Case(
        "a zip entry at the root",
        zipped(adds("/etc/x")),
        "zip entry '/etc/x' points outside its folder",
    ),
    Case(
        "a zip entry on a drive", zipped(adds("C:/x")), "zip entry 'C:/x' points outside its folder"
    ),
    Case("a zip entry with backslashes", zipped(adds("..\\x")), "points outside its folder"),
    Case(
        "a zip entry that is a link",
        zipped(adds("megaSeg/checkpoints/epoch_999.ckpt", b"/etc/passwd", kind=stat.S_IFLNK)),
        "zip entry 'megaSeg/checkpoints/epoch_999.ckpt' is neither a file nor a folder",
    ),
    Case(
        "a zip entry that is a device",
        zipped(adds("megaSeg/x", kind=stat.S_IFCHR)),
        "zip entry 'megaSeg/x' is neither a file nor a folder",
    ),
    Case(
        "a zip entry that is there twice",
        zipped(adds("megaSeg/train_config.yaml")),
        "zip entry 'megaSeg/train_config.yaml' is there twice",
    ),
    Case(
        "two zip entries that Windows and macOS take for one",
        zipped(adds("megaseg/Train_Config.yaml")),
        "zip entry 'megaseg/Train_Config.yaml' is there twice",
    ),
    Case(
        "an encrypted zip",
        zipped(encrypts),
        "zip entry 'megaSeg/x' is encrypted; this zip is not safe and was not read",
    ),
    Case(
        "a zip entry that grows a millionfold",
        zipped(claims(1, 2**31)),
        "zip entry 'megaSeg/0' grows from 100 to 2147483648 bytes",
    ),
    Case("zip entries that grow together", zipped(claims(5, 100 * 2**20)), "the zip grows from"),
    Case("a zip of 5 GiB", zipped(claims(50, 100 * 2**20)), "bytes; at most 4294967296 are read"),
    Case(
        "zip entries that share their bytes", zipped(overlaps), "the entries of the zip overlap: "
    ),
    Case("a zip of 10,001 entries", zipped(crowds), "entries; at most 10000 are read"),
    Case("a zip damaged on its way", damaged, "train_config.yaml cannot be read ("),
    Case(
        "code in the newest checkpoint of a zip",
        zipped(
            lambda archive: archive.writestr(
                "megaSeg/checkpoints/epoch_999.ckpt", f"cos\nsystem\n(S'touch {MARKER}'\ntR."
            )
        ),
        "epoch_999.ckpt pickles os.system",
    ),
    # train_config.yaml
    Case(
        "a YAML object that calls os.system",
        configured(f"a: !!python/object/apply:os.system ['touch {MARKER}']"),
        "train_config.yaml is not YAML",
    ),
    Case(
        "aliases of aliases (billion laughs)",
        configured(doubling("[x, x]", "[NINE]")),
        "train_config.yaml unfolds to more than 50000 values",
    ),
    Case(
        "merges of merges",
        configured(doubling("{k: 1}", "{<<: [NINE]}")),
        "train_config.yaml unfolds to more than 50000 values",
    ),
    Case(
        "an alias of itself",
        configured("a: &a [*a]"),
        "train_config.yaml contains itself, by an alias",
    ),
    Case(
        "YAML nested 100 deep",
        configured("[" * 100 + "]" * 100),
        "train_config.yaml is nested more than 64 deep",
    ),
    Case(
        "YAML nested 100,000 deep",
        configured("[" * 100_000),
        "train_config.yaml is nested more than 64 deep",
    ),
    Case(
        "a train_config.yaml that is a named pipe",
        piped_config,
        "train_config.yaml is no file; expected a config",
    ),
    Case(
        "a number of 20,000 digits",
        configured("a: " + ":".join(["1"] * 10_000)),
        "train_config.yaml has a value of 19999 characters",
    ),
    Case(
        "a train_config.yaml of 300 kB",
        configured("#" * 300_000),
        "train_config.yaml has 300000 bytes, at most 262144 are read",
    ),
    Case(
        "a setting that is stated twice",
        configured("model: {}\nmodel: {}"),
        "train_config.yaml says model twice",
    ),
    Case(
        "a backbone that is os.system",
        changed("model.backbone", {**backbone(), "_target_": "os.system"}),
        "model.backbone._target_ is 'os.system'; only monai.networks.nets.DynUNet is run",
    ),
    Case(
        "a head that is os.system",
        changed("model.task_heads", {"seg": {"_target_": "os.system"}}),
        "task_heads.seg._target_ is 'os.system'; only heads of cyto_dl or aics_im2im are known",
    ),
    Case(
        "a transform that is os.system",
        changed("data.transforms.predict.transforms", [{"_target_": "os.system"}]),
        "predict transform 'os.system' at data.transforms.predict.transforms.0 "
        "is none of monai.transforms",
    ),
    Case(
        "an activation that is os.system",
        changed(
            "model.task_heads",
            {
                "seg": {
                    "postprocess": {
                        "prediction": {
                            "_target_": "cyto_dl.models.im2im.utils.postprocessing.ActThreshLabel",
                            "activation": {"_target_": "os.system"},
                        }
                    }
                }
            },
        ),
        "activation._target_ is 'os.system'; only Sigmoid, Softmax, Identity are understood",
    ),
    Case(
        "a head whose name is a path",
        changed("model.task_heads", {"../../x": {}}),
        "a task head is called '../../x'; expected up to 64 letters",
    ),
    Case(
        "an overlap that is no number",
        changed("model.inference_args", {"overlap": float("nan")}),
        "overlap expected as values from 0 to below 1",
    ),
    Case(
        "a patch of 10^30 voxels",
        changed("model.inference_args", {"roi_size": 10**30}),
        "patch_shape expected as positive sizes below 2^20",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory):
    """Load a good bundle first: torch makes a folder of its own when it first builds a network."""
    load_bundle(write_checkpoint(tmp_path_factory.mktemp("good") / "a.ckpt"))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder in which a case is made; whatever appears beside the bundle was left there."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line_and_nothing_else(case, place):
    path = case.make(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(BundleError) as caught:
        read_bundle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert case.message in message
    assert message.isprintable()
    assert len(message) < 600
    assert re.search(
        r"fetch|get it from|(is|are|not) run|expected|at most|take an earlier|give a bundle",
        message,
    )
    assert caught.value.exit_code == 2
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_command_line_ends_with_2_and_writes_nothing(case, place, capsys):
    path, source = case.make(place), write_image(place / "a.zarr", np.zeros((16, 16, 16), np.uint8))
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["segment", str(source), str(place / "out.zarr"), "--model", str(path)])
    stderr = capsys.readouterr().err
    assert ended.value.code == 2
    assert case.message in stderr
    assert stderr.startswith("megaseg: ")
    assert stderr.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_the_table_is_in_the_docs():
    assert len(CASES) >= 20
    assert len({case.name for case in CASES}) == len(CASES)
    assert table() in DOC.read_text(), "run: python -m tests.models.test_hostile_bundles"


def table() -> str:
    rows = [f"| {case.name} | {case.message.strip()} … |" for case in CASES]
    return "\n".join(
        ["| a bundle with, or that is | is refused with, among other words |", "|---|---|", *rows]
    )


# --- what harms nobody is read


HARMLESS = {
    "a computed setting": (
        "model.backbone.in_channels",
        f"${{eval:__import__('os').system('touch {MARKER}')}}",
    ),
    "a circle of references": ("model.inference_args.overlap", "${model.inference_args.overlap}"),
    "a reference into nothing": ("model.inference_args.roi_size", "${a.b.c}"),
    "an environment variable": ("trainer.precision", "${oc.env:HOME}"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_would_have_to_be_computed_states_nothing(name, place):
    bundle = load_bundle(changed(*HARMLESS[name])(place))
    assert bundle.network.in_channels == 1
    assert bundle.precision == "fp32"
    assert not list(place.rglob(MARKER))


# --- and whatever else it may be


@pytest.mark.parametrize(
    "data", [b"not a checkpoint", b"\x80\x02", bytes(range(256)) * 9, b"PK\x03\x04 broken"]
)
def test_bytes_that_are_no_checkpoint(data, tmp_path):
    with pytest.raises(BundleError, match="fetch it again"):
        load_bundle(written(data)(tmp_path))


FORMS = {
    "checkpoint": lambda d: write_checkpoint(d / "a.ckpt"),
    "old": saved(checkpoint_content, _use_new_zipfile_serialization=False),
    "zip": lambda d: write_zip(d / "megaSeg.zip"),
    "folder": lambda d: write_folder(d / "exp"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(form, share, tmp_path):
    path = FORMS[form](tmp_path)
    file = path / "checkpoints" / "epoch_003.ckpt" if form == "folder" else path
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(BundleError, match="fetch it again"):
        load_bundle(path)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("form", ["checkpoint", "old", "zip"])
def test_flipped_bytes_never_end_otherwise(form, seed, tmp_path):
    path = FORMS[form](tmp_path)
    data = bytearray(path.read_bytes())
    for at in torch.randint(
        len(data), (200,), generator=torch.Generator().manual_seed(seed)
    ).tolist():
        data[at] ^= 0xFF
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # zipfile warns about duplicate names while it reads a broken list
        assert refusal(path).isprintable()


NASTY = [
    None,
    True,
    0,
    -1,
    2,
    10**400,
    float("nan"),
    1e308,
    "",
    "x" * 5000,
    "\x1b[2J\n",
    "???",
    "${model._aux}",
    "${kv_to_dict:${model._aux}}",
    "os.system",
    [],
    [[]],
    [1] * 1000,
    ["a"],
    {},
    {"a": {}},
    {1: 2},
    {"_target_": []},
    b"x",
    {1, 2},
    (1, 2, 3),
    1j,
    torch.ones(2),
    torch.Size((1, 2)),
    torch.float32,
    Runs(os.system, f"touch {MARKER}"),
]
DESCRIBED = {
    "backbone": backbone(),
    "inference_args": {
        "roi_size": [16, 32, 32],
        "overlap": 0.5,
        "mode": "gaussian",
        "sigma_scale": 0.125,
    },
    "inference_heads": ["seg"],
    "task_heads": {
        "seg": {
            "_target_": "cyto_dl.nn.head.ResBlocksHead",
            "loss": {"_target_": "monai.losses.DiceCELoss", "sigmoid": True},
            "postprocess": {
                "prediction": {
                    "_target_": "cyto_dl.models.im2im.utils.postprocessing.ActThreshLabel",
                    "activation": {"_target_": "torch.nn.Sigmoid"},
                    "threshold": 0.5,
                }
            },
        }
    },
}


def refusal(path: Path) -> str:
    """What a BundleError says; nothing if there is none, and any other error passes."""
    try:
        load_bundle(path)
    except BundleError as error:
        return str(error)
    return ""


def places(value: object, *path: object) -> Iterator[tuple]:
    """The path of everything in nested dicts and lists."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in items:
        yield (*path, key)
        yield from places(child, *path, key)


@given(st.sampled_from([*places(DESCRIBED)]), st.sampled_from(NASTY))
def test_any_value_anywhere_is_read_or_refused(path, value):
    described = copy.deepcopy(DESCRIBED)
    section = described
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_checkpoint(
            Path(folder) / "a.ckpt", heads={"seg": (1, 1)}, hyper_parameters=described
        )
        message = refusal(bundle)
    assert message.isprintable()
    assert len(message) < 700
    assert not Path(MARKER).exists()


if __name__ == "__main__":
    text = DOC.read_text()
    old = re.search(r"^\| a bundle with.*?\n(?=\n|\Z)", text, re.M | re.S)
    assert old
    DOC.write_text(text.replace(old[0], f"{table()}\n"))

"""Every form of a bundle says the same, and whatever is not a bundle ends as one clear line."""

import io
import os
import pickle
import stat
import warnings
import zipfile
from dataclasses import replace

import pytest
import torch
import yaml

from megaseg_dask.errors import BundleError
from megaseg_dask.models import NetworkSpec, build_network, files, load_bundle, save_bundle
from tests.unit.bundles import (
    OVERLAP,
    PATCH_SHAPE,
    TINY,
    backbone,
    checkpoint_content,
    inference_args,
    one_thread,
    seeded_network,
    train_config,
    write_checkpoint,
    write_folder,
    write_zip,
)

COMPILED = "backbone._orig_mod."


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def refusal(path, **options) -> str:
    """The message of a refusal: a BundleError, in one line, that names the path."""
    with pytest.raises(BundleError) as caught:
        load_bundle(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 600
    return message


def save(path, content):
    torch.save(content, path)
    return path


# --- every form


FORMS = {
    "checkpoint": lambda d: write_checkpoint(d / "a.ckpt"),
    "compiled": lambda d: write_checkpoint(d / "a.ckpt", prefix=COMPILED),
    "no aliases": lambda d: write_checkpoint(d / "a.ckpt", aliases=False),
    "folder": lambda d: write_folder(d / "exp"),
    "folder of a folder": lambda d: write_folder(d / "exp" / "megaSeg").parent,
    "only train_config.yaml": lambda d: write_folder(d / "exp", hyper_parameters=False),
    "only hyper_parameters": lambda d: write_folder(d / "exp", config={}),
    "zip": lambda d: write_zip(d / "megaSeg.zip"),
    "zip, compiled": lambda d: write_zip(d / "megaSeg.zip", prefix=COMPILED, hyper_parameters=False),
    "zip without a folder": lambda d: write_zip(d / "megaSeg.zip", inside=""),
    "saved here": lambda d: save_bundle(
        d / "s", TINY, seeded_network().state_dict(), patch_shape=PATCH_SHAPE, overlap=OVERLAP, epoch=3
    ),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return load_bundle(write_checkpoint(tmp_path_factory.mktemp("reference") / "a.ckpt"))


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_agree(form, tmp_path, reference):
    bundle = load_bundle(FORMS[form](tmp_path))
    assert bundle.digest == reference.digest
    assert bundle.network == TINY
    assert (bundle.patch_shape, bundle.overlap, bundle.window) == (PATCH_SHAPE, (OVERLAP,) * 3, "gaussian")
    assert bundle.weights.keys() == reference.weights.keys()
    assert all(torch.equal(bundle.weights[key], reference.weights[key]) for key in reference.weights)


def test_the_loaded_network_is_the_saved_one(reference):
    patch = torch.rand(1, 1, *PATCH_SHAPE)
    assert torch.equal(build_network(reference)(patch), seeded_network()(patch))


def test_weights_alone_are_enough(tmp_path, reference):
    bundle = load_bundle(write_checkpoint(tmp_path / "epoch_650.ckpt", hyper_parameters=False))
    assert (bundle.name, bundle.network) == ("epoch_650", TINY)
    assert (bundle.patch_shape, bundle.overlap, bundle.window) == ((64, 128, 128), (0.25,) * 3, "gaussian")
    assert bundle.origins["filters"] == "state dict"
    assert bundle.origins["patch_shape"] == bundle.origins["normalization"] == "reference"
    assert bundle.digest != reference.digest


def test_origins_name_who_said_it(tmp_path):
    hyper = {"backbone": {**backbone(), "filters": None}, "inference_args": {"overlap": [0.25, 0.5, 0.5]}}
    config = train_config(patch_shape=(32, 32, 64), overlap=0.1)
    bundle = load_bundle(write_folder(tmp_path / "x", config=config, hyper_parameters=hyper))
    assert bundle.name == "x"
    assert (bundle.patch_shape, bundle.overlap) == ((32, 32, 64), (0.25, 0.5, 0.5))
    assert bundle.origins == {
        **dict.fromkeys(backbone().keys() - {"_target_", "spatial_dims", "dropout"}, "hyper_parameters"),
        "filters": "state dict",
        "normalization": "train_config.yaml",
        "patch_shape": "train_config.yaml",
        "overlap": "hyper_parameters",
        "window": "train_config.yaml",
    }


def test_one_number_stands_for_every_axis(tmp_path):
    hyper = {
        "backbone": {
            **backbone(),
            "strides": [1, 2, 2, 2, 2],
            "kernel_size": [3] * 5,
            "upsample_kernel_size": [2] * 4,
        },
        "inference_args": {"roi_size": 32, "overlap": 0, "mode": "constant"},
    }
    bundle = load_bundle(write_checkpoint(tmp_path / "a.ckpt", hyper_parameters=hyper))
    assert (bundle.patch_shape, bundle.overlap, bundle.window) == ((32, 32, 32), (0.0, 0.0, 0.0), "constant")


HARMLESS = {
    "dropout": 0.3,
    "deep_supervision": True,
    "norm_name": ["INSTANCE", {"affine": True}],
    "act_name": ["leakyrelu", {"inplace": True, "negative_slope": 0.01}],
    "filters": [*TINY.filters, 99],  # DynUNet cuts the list
    "_target_": "monai.networks.nets.dynunet.DynUNet",
    "trans_bias": False,
}


@pytest.mark.parametrize("argument", HARMLESS)
def test_arguments_that_do_not_change_inference(argument, tmp_path, reference):
    hyper = {
        "backbone": {**backbone(), argument: HARMLESS[argument]},
        "inference_args": {**inference_args(), "sw_batch_size": 4},
    }
    assert load_bundle(write_checkpoint(tmp_path / "a.ckpt", hyper_parameters=hyper)).digest == reference.digest


def test_training_heads_and_losses_are_left_out(tmp_path, reference):
    content = checkpoint_content()
    content["state_dict"] |= {
        "backbone.deep_supervision_heads.0.conv.conv.bias": torch.ones(1),
        "backbone.skip_layers.next_layer.super_head.conv.conv.bias": torch.ones(1),
        "task_heads.seg.loss.class_weight": torch.ones(1),
    }
    assert load_bundle(save(tmp_path / "a.ckpt", content)).digest == reference.digest


def test_old_pickle_format(tmp_path, reference):
    torch.save(checkpoint_content(), tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    assert load_bundle(tmp_path / "a.ckpt").digest == reference.digest


# --- which checkpoint


def checkpoints(folder, *names):
    """One folder with checkpoints of these names, the seed of each its place in the list."""
    for seed, name in enumerate(names):
        write_checkpoint(folder / "checkpoints" / name, seed=seed)
    return folder


def seed_of(bundle) -> int:
    key = "output_block.conv.conv.bias"
    return [seeded_network(seed=seed).state_dict()[key].item() for seed in range(3)].index(bundle.weights[key].item())


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("epoch_009.ckpt", "epoch_010.ckpt", "last.ckpt"), 1),
        (("epoch=100-step=5.ckpt", "epoch=99-step=9.ckpt"), 0),
        (("epoch_010.ckpt", "epoch_010-v1.ckpt"), 1),
        (("last.ckpt",), 0),
        (("best.ckpt", "._best.ckpt"), 0),
    ],
)
def test_highest_epoch_and_last_only_when_alone(names, chosen, tmp_path):
    assert seed_of(load_bundle(checkpoints(tmp_path, *names))) == chosen


@pytest.mark.parametrize("wanted", ["last", "last.ckpt"])
def test_checkpoint_by_name(wanted, tmp_path):
    folder = checkpoints(tmp_path, "epoch_009.ckpt", "last.ckpt")
    assert seed_of(load_bundle(folder, checkpoint=wanted)) == 1


def test_no_such_checkpoint(tmp_path):
    folder = checkpoints(tmp_path / "x", "last.ckpt", "best.ckpt")
    assert "no checkpoint that names its epoch; there are: best.ckpt, last.ckpt" in refusal(folder)
    assert "no checkpoint epoch_7; there are: best.ckpt, last.ckpt" in refusal(folder, checkpoint="epoch_7")
    file = folder / "checkpoints" / "last.ckpt"
    assert "one checkpoint, not a folder with one named best" in refusal(file, checkpoint="best")
    assert load_bundle(file, checkpoint="last").name == "last"


def test_folders_that_are_no_bundle(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "absent")
    assert "expected one folder with checkpoints/*.ckpt" in refusal(tmp_path)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "there are: none" in refusal(tmp_path)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    assert "found empty, other" in refusal(tmp_path)


# --- networks and settings that are not run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_target_": "os.system"}, "_target_ is 'os.system'; only monai.networks.nets.DynUNet is run"),
        ({"_target_": "monai.networks.nets.UNet"}, "only monai.networks.nets.DynUNet"),
        ({"spatial_dims": 2}, "spatial_dims is 2; only 3"),
        ({"norm_name": "BATCH"}, "norm_name is 'BATCH'; only"),
        ({"norm_name": "INSTANCE"}, "norm_name is 'INSTANCE'; only"),
        ({"norm_name": ["INSTANCE", {"affine": True, "track_running_stats": True}]}, "norm_name"),
        ({"act_name": "relu"}, "act_name is 'relu'; only leakyrelu"),
        ({"act_name": ["leakyrelu", {"negative_slope": 0.2}]}, "act_name"),
        ({"trans_bias": True}, "trans_bias is True; only False"),
        ({"attention": True}, "attention is True; not an argument known here"),
        ({"_args_": [1]}, "_args_ is [1]; not an argument"),
        (
            {"filters": [4, 4, 8, 8, 16]},
            "filters: {source} says [4, 4, 8, 8, 16], the weights are of (4, 4, 8, 8, 8)",
        ),
        ({"filters": [4, 4]}, "the weights are of (4, 4, 8, 8, 8)"),
        ({"strides": [1, 2, 2, 2, 1]}, "strides: {source} says [1, 2, 2, 2, 1]"),
        ({"strides": [2, 2, 2, 2, 2]}, "strides: {source} says [2, 2, 2, 2, 2]"),
        ({"kernel_size": [3, 3, 3, 3, 5]}, "kernel_size"),
        ({"res_block": False}, "res_block: {source} says False, the weights are of True"),
        ({"in_channels": 2}, "in_channels: {source} says 2, the weights are of 1"),
    ],
)
@pytest.mark.parametrize("source", ["hyper_parameters", "train_config.yaml"])
def test_other_networks_are_refused_by_name(source, change, message, tmp_path):
    if source == "hyper_parameters":
        path = write_checkpoint(tmp_path / "a.ckpt", hyper_parameters={"backbone": {**backbone(), **change}})
    else:
        config = {"model": {"backbone": {**backbone(), **change}}}
        path = write_folder(tmp_path / "x", config=config, hyper_parameters=False)
    assert message.format(source=source) in refusal(path)


def test_a_value_that_cannot_be_compared_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", hyper_parameters={"backbone": {"filters": torch.ones(5)}})
    assert "filters: hyper_parameters says <Tensor>" in refusal(path)


def test_filters_of_the_plugin_are_compared_too(tmp_path):
    config = train_config(replace(TINY, filters=(8, 8, 8, 8, 8)))
    path = write_folder(tmp_path / "x", config=config, hyper_parameters=False)
    assert "filters: train_config.yaml says [8, 8, 8, 8, 8], the weights" in refusal(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "triangle"}, "blending mode 'triangle'"),
        ({"mode": 3}, "blending mode '3'"),
        ({"roi_size": [64, 64]}, "patch_shape is [64, 64]; expected three numbers"),
        ({"roi_size": [64.0, 64, 64]}, "patch_shape is"),
        ({"roi_size": -1}, "patch_shape (-1, -1, -1): expected positive"),
        ({"overlap": "half"}, "overlap is 'half'"),
        ({"overlap": 1.0}, "from 0 to below 1"),
        ({"overlap": True}, "overlap is True"),
        ({"sigma_scale": 0.5}, "inference_args in hyper_parameters: sigma_scale is 0.5; only 0.125"),
        ({"padding_mode": "reflect"}, "padding_mode is 'reflect'; only constant"),
        ({"process_fn": "x"}, "process_fn is 'x'; not an argument"),
    ],
)
def test_other_inference_is_refused_by_name(arguments, message, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", hyper_parameters={"inference_args": arguments})
    assert message in refusal(path)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (replace(TINY, in_channels=2), "in_channels 2, out_channels 1: only networks with one channel"),
        (replace(TINY, out_channels=3), "in_channels 1, out_channels 3"),
    ],
)
def test_several_channels_are_refused(network, message, tmp_path):
    assert message in refusal(write_checkpoint(tmp_path / "a.ckpt", network))


def test_several_heads_are_refused(tmp_path):
    heads = {"seg": {}, "nuclei": {}}
    path = write_checkpoint(tmp_path / "a.ckpt", hyper_parameters={"task_heads": heads})
    assert "2 task heads (nuclei, seg)" in refusal(path)
    path = write_folder(tmp_path / "x", config={"model": {"task_heads": heads}}, hyper_parameters=False)
    assert "2 task heads (nuclei, seg)" in refusal(path)
    content = checkpoint_content()
    content["state_dict"]["task_heads.seg.model.conv.weight"] = torch.ones(1)
    assert "outside the backbone (task_heads.seg.model.conv.weight)" in refusal(save(tmp_path / "b.ckpt", content))


NORMALIZE = {"_target_": "monai.transforms.NormalizeIntensityd", "keys": "raw", "channel_wise": True}
PERCENTILES = {"_target_": "monai.transforms.ScaleIntensityRangePercentilesd", "keys": "raw"}


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([PERCENTILES], "predict transform ScaleIntensityRangePercentilesd"),
        ([NORMALIZE, PERCENTILES], "predict transform ScaleIntensityRangePercentilesd"),
        ([{**NORMALIZE, "channel_wise": False}], "NormalizeIntensityd: channel_wise is False; only True"),
        ([{"_target_": NORMALIZE["_target_"]}], "channel_wise is False"),
        ([{**NORMALIZE, "nonzero": True}], "nonzero is True; only False"),
        ([{**NORMALIZE, "subtrahend": 3}], "subtrahend is 3; not an argument"),
        ([{**NORMALIZE, "dtype": "float16"}], "dtype is 'float16'; only float32"),
        ([{"_target_": "monai.transforms.LoadImaged"}], "lack NormalizeIntensityd"),
        ([], "lack NormalizeIntensityd"),
        ([{"keys": "raw"}], "predict transform None"),
        ([7], "predict transform None"),
    ],
)
def test_other_preprocessing_is_refused_by_name(transforms, message, tmp_path):
    config = {"data": {"transforms": {"predict": {"transforms": transforms}}}}
    assert message in refusal(write_folder(tmp_path / "x", config=config))


@pytest.mark.parametrize("predict", ["${data.transforms.test}", {"transforms": "${a}"}, {"transforms": ["${a}"]}, None])
def test_unresolved_preprocessing_falls_to_the_reference(predict, tmp_path):
    config = {"data": {"transforms": {"predict": predict}}}
    assert load_bundle(write_folder(tmp_path / "x", config=config)).origins["normalization"] == "reference"


# --- files that are broken or hostile


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def test_pickled_code_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = checkpoint_content()
    for key in ("hyper_parameters", "callbacks"):
        message = refusal(save(tmp_path / "a.ckpt", {**content, key: {"x": Hostile()}}))
        assert "a.ckpt pickles posix.system, neither a tensor nor a plain value" in message
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Hostile()))
    assert "b.ckpt" in refusal(tmp_path / "b.ckpt")
    (tmp_path / "c.zip").write_bytes(write_zip(tmp_path / "d.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "c.zip", "a") as archive:
        archive.write(tmp_path / "a.ckpt", "megaSeg/checkpoints/epoch_999.ckpt")
    assert "epoch_999.ckpt pickles posix.system" in refusal(tmp_path / "c.zip")
    assert not list(tmp_path.glob("hostile*"))


@pytest.mark.parametrize("data", [b"", b"not a checkpoint", b"\x80\x02", bytes(range(256)) * 9, b"PK\x03\x04 broken"])
def test_bytes_that_are_no_checkpoint(data, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(data)
    assert "is not a checkpoint, or not a whole one; fetch it again" in refusal(tmp_path / "a.ckpt")


@pytest.mark.parametrize("form", ["checkpoint", "old", "zip", "folder"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files(form, share, tmp_path):
    if form == "old":
        torch.save(checkpoint_content(), tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    path = tmp_path / "a.ckpt" if form == "old" else FORMS[form](tmp_path)
    file = path / "checkpoints" / "epoch_003.ckpt" if form == "folder" else path
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "fetch it again" in refusal(path)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("form", ["checkpoint", "zip"])
def test_flipped_bytes_never_end_otherwise(form, seed, tmp_path):
    path = FORMS[form](tmp_path)
    data = bytearray(path.read_bytes())
    for place in torch.randint(len(data), (200,), generator=torch.Generator().manual_seed(seed)).tolist():
        data[place] ^= 0xFF
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about duplicate names while it reads a broken list
        try:
            load_bundle(path)
        except BundleError:
            return


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state_dict, found list"),
        ({"epoch": 1, "model": {}}, "expected a state_dict, found epoch, model"),
        ({"state_dict": [1]}, "expected a state_dict"),
        ({"state_dict": {}}, "no input_block.conv1.conv.weight"),
        ({"state_dict": {"weight": torch.ones(1)}}, "outside the backbone (weight)"),
        ({"state_dict": {7: torch.ones(1)}}, "outside the backbone (7)"),
        ({"state_dict": {"backbone.x": 3}}, "more than tensors (backbone.x)"),
        ({"state_dict": {"backbone.\n" + "x" * 900: 3}}, "more than tensors"),
        ({**checkpoint_content(), "hyper_parameters": 3, "state_dict": {}}, "not of a DynUNet"),
    ],
)
def test_checkpoints_of_something_else(content, message, tmp_path):
    assert message in refusal(save(tmp_path / "a.ckpt", content))


def test_weights_that_are_no_numbers(tmp_path):
    content = checkpoint_content()
    content["state_dict"]["backbone.input_block.norm1.weight"][2] = float("inf")
    assert "input_block.norm1.weight holds NaN or infinity" in refusal(save(tmp_path / "a.ckpt", content))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "train_config.yaml is not YAML"),
        ("\x00", "train_config.yaml is not YAML"),
        ("[" * 100_000, "train_config.yaml is not YAML"),
        ("a: !!int ''", "train_config.yaml is not YAML"),
        ("a: !!python/object/apply:os.system ['touch hostile-was-here']", "train_config.yaml is not YAML"),
        ("- 1", "not a configuration but [1]"),
        ("", "not a configuration but None"),
        (BOMB + "model: {backbone: {filters: *n}}", "filters: train_config.yaml says [["),
        (BOMB + "model: {_aux: {overlap: *n}}", "overlap is [["),
        (BOMB + "data: {transforms: {predict: {transforms: [{_target_: *n}]}}}", "predict transform [["),
    ],
)
def test_hostile_yaml(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "x", hyper_parameters=False)
    (folder / "train_config.yaml").write_text(text)
    assert message in refusal(folder)
    assert not list(tmp_path.glob("hostile*"))


def entry(name: str, *, link: bool = False) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = ((stat.S_IFLNK if link else stat.S_IFREG) | 0o644) << 16
    return info


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a//x", "//", "C:/x", "..\\x", "./x"])
def test_zip_entries_outside_their_folder(name, tmp_path):
    path = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry(name), b"")
    assert "points outside its folder; this zip is not safe" in refusal(path)


def test_zip_entries_that_are_links(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry("megaSeg/checkpoints/epoch_999.ckpt", link=True), "/etc/passwd")
    assert "epoch_999.ckpt' is a link; this zip is not safe" in refusal(path)


def test_size_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RATIO_FROM_BYTES", 10**6)
    path = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry("megaSeg/bomb"), bytes(2 * 10**6))
    assert "megaSeg/bomb' grows from" in refusal(path)
    inner = FORMS["checkpoint"](tmp_path)
    with zipfile.ZipFile(inner, "a") as archive:
        archive.writestr(entry("a/data/bomb"), bytes(2 * 10**6))
    assert "a/data/bomb' grows from" in refusal(inner)


def test_files_that_are_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_BYTES", 1000)
    assert "at most 1000 are read" in refusal(FORMS["zip"](tmp_path))
    assert "at most 1000 are read" in refusal(FORMS["folder"](tmp_path))
    assert "at most 1000 are read" in refusal(FORMS["checkpoint"](tmp_path))


def test_zip_that_cannot_be_decoded(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("megaSeg/train_config.yaml").header_offset
    data[offset + 60 : offset + 90] = bytes(30)
    path.write_bytes(data)
    assert "train_config.yaml cannot be read" in refusal(path)


def test_a_mac_zip(tmp_path, reference):
    path = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/checkpoints/._epoch_650.ckpt", b"x")
        archive.writestr("megaSeg/checkpoints/._epoch_650.ckpt", b"x")
    assert load_bundle(path).digest == reference.digest


# --- saving


def saved(folder, network: NetworkSpec = TINY, **options):
    state = seeded_network(network).state_dict()
    return save_bundle(folder, network, state, patch_shape=PATCH_SHAPE, overlap=OVERLAP, epoch=12, **options)


def test_saved_checkpoint_is_what_cyto_dl_reads(tmp_path):
    path = saved(tmp_path)
    assert path == tmp_path / "checkpoints" / "epoch_012.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"] == {"backbone": backbone(), "inference_args": inference_args()}
    assert content["pytorch-lightning_version"]
    state = content["state_dict"]
    assert state.keys() == {f"backbone.{key}" for key in seeded_network().state_dict()}
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == 75


@pytest.mark.parametrize("half", [False, True])
def test_saved_bundles_load_as_float32(half, tmp_path):
    size = saved(tmp_path, half=half).stat().st_size
    state = seeded_network().state_dict()
    stored = {key: value.half() if half else value for key, value in state.items()}
    weights = load_bundle(tmp_path).weights
    assert all(torch.equal(tensor, stored[key].float()) for key, tensor in weights.items())
    n_bytes = sum(tensor.numel() for tensor in weights.values()) * (2 if half else 4)
    assert n_bytes < size < n_bytes + 75 * 1000


def test_either_part_of_a_saved_bundle_is_enough(tmp_path):
    path = saved(tmp_path)
    whole, alone = load_bundle(tmp_path), load_bundle(path)
    content = torch.load(path, weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, path)
    assert load_bundle(tmp_path).digest == alone.digest == whole.digest
    assert set(load_bundle(tmp_path).origins.values()) == {"train_config.yaml"}


def test_saved_configuration_is_where_the_plugin_looks(tmp_path):
    saved(tmp_path)
    text = (tmp_path / "train_config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"]["_aux"] == {"filters": [*TINY.filters], "overlap": OVERLAP}
    assert config["data"]["_aux"] == {"patch_shape": [*PATCH_SHAPE]}
    assert "&" not in text


def test_saving_checks_the_weights(tmp_path):
    with pytest.raises(BundleError, match="do not fit the network"):
        save_bundle(tmp_path / "x", TINY, {}, patch_shape=PATCH_SHAPE, overlap=OVERLAP, epoch=1)
    assert not (tmp_path / "x").exists()


def test_helper_writes_what_cyto_dl_writes():
    """The keys of cyto-dl's own checkpoints, counted there: 148, of 75 tensors."""
    state = checkpoint_content()["state_dict"]
    assert len(state) == 148
    assert len({tensor.data_ptr() for tensor in state.values()}) == 75
    assert yaml.safe_load(io.StringIO(yaml.safe_dump(train_config())))

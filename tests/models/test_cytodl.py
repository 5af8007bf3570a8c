"""Every form of a bundle says the same, and whatever is not a bundle ends as one clear line."""

import io
import zipfile
from dataclasses import replace

import pytest
import torch
import yaml

from megaseg_dask.errors import BundleError
from megaseg_dask.models import (
    Head,
    NetworkSpec,
    NewBundle,
    Preprocessing,
    Step,
    load_bundle,
    read_bundle,
    save_bundle,
)
from megaseg_dask.models.build import build_network
from tests.fixtures.bundles import (
    OVERLAP,
    PATCH_SHAPE,
    TINY,
    backbone,
    checkpoint_content,
    inference_args,
    one_thread,
    seeded_head,
    seeded_network,
    train_config,
    write_checkpoint,
    write_folder,
    write_zip,
)

COMPILED = "backbone._orig_mod."
NETWORK_ARGUMENTS = backbone().keys() - {"_target_", "spatial_dims", "dropout"}
SETTINGS = (
    "heads",
    "heads.seg.activation",
    "heads.seg.threshold",
    "patch_shape",
    "overlap",
    "window",
    "preprocessing",
    "precision",
)


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


def new_bundle(network: NetworkSpec = TINY, epoch: int = 12) -> NewBundle:
    return NewBundle(network, PATCH_SHAPE, OVERLAP, epoch)


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
    "zip, compiled": lambda d: write_zip(
        d / "megaSeg.zip", prefix=COMPILED, hyper_parameters=False
    ),
    "zip without a folder": lambda d: write_zip(d / "megaSeg.zip", inside=""),
    "saved here": lambda d: save_bundle(
        d / "s", new_bundle(epoch=3), seeded_network().state_dict()
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
    assert (bundle.patch_shape, bundle.overlap, bundle.window) == (
        PATCH_SHAPE,
        (OVERLAP,) * 3,
        "gaussian",
    )
    assert bundle.weights.keys() == reference.weights.keys()
    assert all(
        torch.equal(bundle.weights[key], reference.weights[key]) for key in reference.weights
    )


def test_the_loaded_network_is_the_saved_one(reference):
    patch = torch.rand(1, 1, *PATCH_SHAPE)
    assert torch.equal(build_network(reference)(patch), seeded_network()(patch))


def test_weights_alone_are_enough(tmp_path, reference):
    bundle = load_bundle(write_checkpoint(tmp_path / "epoch_650.ckpt", hyper_parameters=False))
    assert (bundle.name, bundle.network) == ("epoch_650", TINY)
    assert (bundle.patch_shape, bundle.overlap, bundle.window) == (
        (64, 128, 128),
        (0.25,) * 3,
        "gaussian",
    )
    assert bundle.heads == (Head(),)
    assert bundle.preprocessing == Preprocessing((Step("zscore"),))
    assert bundle.origins == {
        "weights": "epoch_650.ckpt: state_dict (the file itself)",
        **dict.fromkeys(NETWORK_ARGUMENTS, "shapes of the weights"),
        **dict.fromkeys(SETTINGS, "reference value"),
    }
    assert bundle.digest != reference.digest


def test_origins_name_who_said_it(tmp_path):
    hyper = {
        "backbone": {**backbone(), "filters": None},
        "inference_args": {"overlap": [0.25, 0.5, 0.5]},
    }
    config = train_config(patch_shape=(32, 32, 64), overlap=0.1)
    bundle = load_bundle(write_folder(tmp_path / "x", config=config, hyper_parameters=hyper))
    assert bundle.name == "x"
    assert (bundle.patch_shape, bundle.overlap) == ((32, 32, 64), (0.25, 0.5, 0.5))
    hyper_parameters, config = "epoch_003.ckpt: hyper_parameters", "train_config.yaml"
    assert bundle.origins == {
        "weights": "epoch_003.ckpt: state_dict (the only one)",
        **{argument: f"{hyper_parameters}.backbone.{argument}" for argument in NETWORK_ARGUMENTS},
        "filters": "shapes of the weights",
        "heads": "reference value",
        "heads.seg.activation": "reference value",
        "heads.seg.threshold": "reference value",
        "patch_shape": f"{config}: model.inference_args.roi_size",
        "overlap": f"{hyper_parameters}.inference_args.overlap",
        "window": f"{config}: model.inference_args.mode",
        "preprocessing": f"{config}: data.transforms.predict.transforms",
        "precision": "reference value",
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
    assert (bundle.patch_shape, bundle.overlap, bundle.window) == (
        (32, 32, 32),
        (0.0, 0.0, 0.0),
        "constant",
    )


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
    assert (
        load_bundle(write_checkpoint(tmp_path / "a.ckpt", hyper_parameters=hyper)).digest
        == reference.digest
    )


def test_training_heads_and_losses_are_left_out(tmp_path, reference):
    content = checkpoint_content()
    content["state_dict"] |= {
        "backbone.deep_supervision_heads.0.conv.conv.bias": torch.ones(1),
        "backbone.skip_layers.next_layer.super_head.conv.conv.bias": torch.ones(1),
        "task_heads.seg.loss.class_weight": torch.ones(1),
    }
    assert load_bundle(save(tmp_path / "a.ckpt", content)).digest == reference.digest


@pytest.mark.parametrize(
    "prefix", ["", "module.", "module.backbone.", "model.", "net.", "module.model."]
)
def test_what_other_programs_put_before_all_keys(prefix, tmp_path, reference):
    path = write_checkpoint(tmp_path / "a.ckpt", prefix=prefix)
    assert load_bundle(path).digest == reference.digest


def test_moving_averages_are_named(tmp_path):
    content = checkpoint_content()
    of_average = checkpoint_content(seed=1, prefix="backbone_ema.")["state_dict"]
    content["state_dict"] |= of_average
    assert "moving averages of weights (backbone_ema." in refusal(
        save(tmp_path / "a.ckpt", content)
    )


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
    return [seeded_network(seed=seed).state_dict()[key].item() for seed in range(3)].index(
        bundle.weights[key].item()
    )


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("epoch_009.ckpt", "epoch_010.ckpt", "last.ckpt"), 1),
        (("epoch=100-step=5.ckpt", "epoch=99-step=9.ckpt"), 0),
        (("epoch_010.ckpt", "epoch_010-v1.ckpt"), 1),
        (("last.ckpt",), 0),
        (("best.ckpt", "._best.ckpt"), 0),
        (("last.ckpt", "best.ckpt"), 1),
        (("epoch_010.ckpt", "last-v1.ckpt", "last.ckpt"), 0),
        (("epoch=9-val_loss=0.25.ckpt", "epoch=12-val_loss=0.31.ckpt", "last.ckpt"), 0),
        (("epoch=9-val_loss=3e-2.ckpt", "epoch=12-val_loss=0.0299.ckpt"), 1),
        (("epoch=9-val_loss=0.25.ckpt", "epoch=12.ckpt"), 1),
        (
            (
                "epoch=9-train_loss=0.31-val_loss=0.25.ckpt",
                "epoch=12-train_loss=0.02-val_loss=0.31.ckpt",
            ),
            0,
        ),
    ],
)
def test_highest_epoch_and_last_only_when_alone(names, chosen, tmp_path):
    assert seed_of(load_bundle(checkpoints(tmp_path, *names))) == chosen


@pytest.mark.parametrize("slash", ["/", "\\"])
@pytest.mark.parametrize("with_last", [True, False])
def test_the_best_is_what_lightning_recorded(with_last, slash, tmp_path):
    names = ["epoch_004.ckpt", "epoch_007.ckpt", *["last.ckpt"] * with_last]
    folder = checkpoints(tmp_path, *names)
    newest = folder / "checkpoints" / names[-1]
    content = torch.load(newest, weights_only=True)
    state = {
        "monitor": "val/loss",
        "best_model_score": torch.tensor(0.2),
        "best_model_path": slash.join(("", "elsewhere", "epoch_004.ckpt")),
    }
    torch.save({**content, "callbacks": {"ModelCheckpoint{'monitor': 'val/loss'}": state}}, newest)
    bundle = load_bundle(folder)
    assert seed_of(bundle) == 0
    assert bundle.origins["weights"].endswith("(recorded as the best of 2)")


@pytest.mark.parametrize("wanted", ["last", "last.ckpt"])
def test_checkpoint_by_name(wanted, tmp_path):
    folder = checkpoints(tmp_path, "epoch_009.ckpt", "last.ckpt")
    assert seed_of(load_bundle(folder, checkpoint=wanted)) == 1


def test_no_such_checkpoint(tmp_path):
    folder = checkpoints(tmp_path / "x", "last.ckpt", "best.ckpt", "good.ckpt")
    there = "best.ckpt, good.ckpt, last.ckpt; choose one with --checkpoint"
    assert f"no checkpoint that names its epoch; there are: {there}" in refusal(folder)
    assert f"no checkpoint epoch_7; there are: {there}" in refusal(folder, checkpoint="epoch_7")
    assert "several of the newest epoch; there are: epoch=3-step=9.ckpt, epoch_003.ckpt" in refusal(
        checkpoints(tmp_path / "y", "epoch_003.ckpt", "epoch=3-step=9.ckpt")
    )
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
        (
            {"_target_": "os.system"},
            "_target_ is 'os.system'; only monai.networks.nets.DynUNet is run",
        ),
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
            "{source}backbone.filters is [4, 4, 8, 8, 16], the weights are of (4, 4, 8, 8, 8)",
        ),
        ({"filters": [4, 4]}, "the weights are of (4, 4, 8, 8, 8)"),
        ({"strides": [1, 2, 2, 2, 1]}, "{source}backbone.strides is [1, 2, 2, 2, 1]"),
        ({"strides": [2, 2, 2, 2, 2]}, "{source}backbone.strides is [2, 2, 2, 2, 2]"),
        ({"kernel_size": [3, 3, 3, 3, 5]}, "kernel_size"),
        ({"res_block": False}, "{source}backbone.res_block is False, the weights are of True"),
        ({"in_channels": 2}, "{source}backbone.in_channels is 2, the weights are of 1"),
    ],
)
@pytest.mark.parametrize("source", ["a.ckpt: hyper_parameters.", "train_config.yaml: model."])
def test_other_networks_are_refused_by_name(source, change, message, tmp_path):
    if source == "a.ckpt: hyper_parameters.":
        path = write_checkpoint(
            tmp_path / "a.ckpt", hyper_parameters={"backbone": {**backbone(), **change}}
        )
    else:
        config = {"model": {"backbone": {**backbone(), **change}}}
        path = write_folder(tmp_path / "x", config=config, hyper_parameters=False)
    assert message.format(source=source) in refusal(path)


def test_a_value_that_cannot_be_compared_is_refused(tmp_path):
    path = write_checkpoint(
        tmp_path / "a.ckpt", hyper_parameters={"backbone": {"filters": torch.ones(5)}}
    )
    assert "a.ckpt: hyper_parameters.backbone.filters is <Tensor>" in refusal(path)


def test_filters_of_the_plugin_are_compared_too(tmp_path):
    config = train_config(replace(TINY, filters=(8, 8, 8, 8, 8)))
    path = write_folder(tmp_path / "x", config=config, hyper_parameters=False)
    assert "train_config.yaml: model.backbone.filters is [8, 8, 8, 8, 8], the weights" in refusal(
        path
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"mode": "triangle"},
            "a.ckpt: hyper_parameters.inference_args.mode is 'triangle'; blending mode expected",
        ),
        ({"mode": 3}, "mode is 3; blending mode expected 'gaussian' or 'constant'"),
        ({"mode": torch.ones(2)}, "mode is <Tensor>; blending mode"),
        ({"roi_size": [64, 64]}, "roi_size is [64, 64]; patch_shape expected as three numbers"),
        ({"roi_size": [64.0, 64, 64]}, "roi_size is"),
        ({"roi_size": -1}, "patch_shape expected as positive sizes"),
        ({"overlap": "half"}, "overlap is 'half'"),
        ({"overlap": 1.0}, "from 0 to below 1"),
        ({"overlap": True}, "overlap is True"),
        ({"sigma_scale": 0.5}, "hyper_parameters.inference_args.sigma_scale is 0.5; only 0.125"),
        ({"padding_mode": "reflect"}, "padding_mode is 'reflect'; only constant"),
        ({"process_fn": "x"}, "process_fn is 'x'; not an argument"),
    ],
)
def test_other_inference_is_refused_by_name(arguments, message, tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", hyper_parameters={"inference_args": arguments})
    assert message in refusal(path)


# --- channels and heads


@pytest.mark.parametrize(
    ("network", "outputs"),
    [
        (replace(TINY, in_channels=2), ("seg",)),
        (replace(TINY, out_channels=3), ("seg-0", "seg-1", "seg-2")),
    ],
)
def test_several_channels(network, outputs, tmp_path):
    bundle = load_bundle(write_checkpoint(tmp_path / "a.ckpt", network))
    assert (bundle.network, bundle.heads) == (network, (Head(channels=network.out_channels),))
    assert bundle.outputs == outputs
    patch = torch.rand(2, network.in_channels, *PATCH_SHAPE)
    assert torch.equal(build_network(bundle)(patch), seeded_network(network)(patch))


FOUR = replace(TINY, in_channels=2, out_channels=4)


def test_heads_with_layers_of_their_own(tmp_path):
    path = write_checkpoint(
        tmp_path / "a.ckpt", FOUR, heads={"nuclei": (1, 2), "all": None, "membrane": (0, 1)}
    )
    bundle = load_bundle(path)
    assert bundle.outputs == (
        "nuclei-0",
        "nuclei-1",
        "all-0",
        "all-1",
        "all-2",
        "all-3",
        "membrane",
    )
    assert bundle.heads == (
        Head("nuclei", 2, n_blocks=1),
        Head("all", 4),
        Head("membrane", 1, n_blocks=0),
    )
    patch = torch.rand(1, 2, *PATCH_SHAPE)
    features = seeded_network(FOUR)(patch)
    expected = [seeded_head(4, 1, 2)(features), features, seeded_head(4, 0, 1)(features)]
    found = build_network(bundle)(patch)
    assert found.shape == (1, 7, *PATCH_SHAPE)
    assert torch.equal(found, torch.cat(expected, dim=1))


def test_one_head_with_layers_is_run(tmp_path):
    bundle = load_bundle(
        write_checkpoint(tmp_path / "a.ckpt", replace(FOUR, in_channels=1), heads={"seg": (2, 1)})
    )
    patch = torch.rand(1, 1, *PATCH_SHAPE)
    features = seeded_network(bundle.network)(patch)
    assert torch.equal(build_network(bundle)(patch), seeded_head(4, 2, 1)(features))


def test_heads_decide_the_digest(tmp_path, reference):
    def digest(name, *change, **heads):
        content = checkpoint_content(heads=heads or None)
        for head in change:
            content["hyper_parameters"]["task_heads"]["seg"] = head
        return read_bundle(save(tmp_path / f"{name}.ckpt", content)).digest

    # A single head's name and threshold are no part of a result.
    assert (
        digest("a", nuclei=None)
        == digest("b", {"postprocess": {"prediction": OTSU}})
        == reference.digest
    )
    others = [
        digest("c", a=None, b=None),
        digest("d", b=None, a=None),
        digest("e", a=(1, 1)),
        digest(
            "f",
            {
                "postprocess": {
                    "prediction": ACTIVATION | {"activation": {"_target_": "torch.nn.Softmax"}}
                }
            },
        ),
    ]
    assert len({reference.digest, *others}) == 5


POSTPROCESSING = "cyto_dl.models.im2im.utils.postprocessing."
OTSU = {"_target_": f"{POSTPROCESSING}AutoThreshold", "method": "threshold_otsu"}
ACTIVATION = {"_target_": f"{POSTPROCESSING}ActThreshLabel"}
SIGMOID = ACTIVATION | {"activation": {"_target_": "torch.nn.Sigmoid"}}
MSE = {"_target_": "torch.nn.MSELoss"}
REFERENCE, METHOD = "reference value", "HEAD.postprocess.prediction.method"
ACTIVATED, FIXED = (
    "HEAD.postprocess.prediction.activation._target_",
    "HEAD.postprocess.prediction.threshold",
)
DICE = {"_target_": "monai.losses.GeneralizedDiceFocalLoss", "sigmoid": True}


@pytest.mark.parametrize(
    ("head", "activation", "threshold", "origins"),
    [
        ({}, "sigmoid", 0.5, (REFERENCE, REFERENCE)),
        ({"prediction": OTSU}, "sigmoid", "otsu", (REFERENCE, METHOD)),
        ({"prediction": OTSU, "loss": DICE}, "sigmoid", "otsu", ("HEAD.loss.sigmoid", METHOD)),
        ({"prediction": OTSU | {"method": 0.0}}, "sigmoid", 0.5, (REFERENCE, METHOD)),
        (
            {"prediction": OTSU | {"method": "threshold_local"}},
            "sigmoid",
            0.5,
            (REFERENCE, f"{REFERENCE} ({METHOD} is 'threshold_local')"),
        ),
        ({"prediction": SIGMOID}, "sigmoid", 0.5, (ACTIVATED, REFERENCE)),
        ({"prediction": SIGMOID | {"threshold": 0.3}}, "sigmoid", 0.3, (ACTIVATED, FIXED)),
        (
            {"prediction": SIGMOID | {"threshold": 128}},
            "sigmoid",
            0.5,
            (ACTIVATED, f"{REFERENCE} ({FIXED} is 128)"),
        ),
        (
            {"prediction": ACTIVATION, "loss": DICE},
            "sigmoid",
            0.5,
            ("HEAD.loss.sigmoid", REFERENCE),
        ),
        (
            {"prediction": ACTIVATION, "loss": {"_target_": "monai.losses.DiceCELoss"}},
            "sigmoid",
            0.5,
            (REFERENCE, REFERENCE),
        ),
        (
            {"prediction": ACTIVATION, "loss": MSE},
            "identity",
            0.5,
            ("HEAD.postprocess.prediction._target_, without an activation", REFERENCE),
        ),
        ({"loss": {"softmax": True}}, "softmax", 0.5, ("HEAD.loss.softmax", REFERENCE)),
    ],
)
def test_how_scores_come_from_logits(head, activation, threshold, origins, tmp_path):
    where = "a.ckpt: hyper_parameters.task_heads.seg"
    described = {"_target_": "cyto_dl.nn.BaseHead", "loss": head.get("loss")}
    described["postprocess"] = {"prediction": head.get("prediction")}
    path = write_checkpoint(
        tmp_path / "a.ckpt", hyper_parameters={"task_heads": {"seg": described}}
    )
    bundle = read_bundle(path)
    assert bundle.heads == (Head(activation=activation, threshold=threshold),)
    found = bundle.origins["heads.seg.activation"], bundle.origins["heads.seg.threshold"]
    assert found == tuple(origin.replace("HEAD", where) for origin in origins)
    if activation != "sigmoid":
        assert f"{found[0]}: activation {activation}; only a sigmoid is run" in refusal(path)


RES_BLOCKS = {"_target_": "cyto_dl.nn.head.ResBlocksHead"}


def shown(prediction: dict) -> dict:
    return {"postprocess": {"prediction": prediction}}


@pytest.mark.parametrize(
    ("layers", "described", "message"),
    [
        (
            None,
            {"_target_": "mine.Head"},
            "_target_ is 'mine.Head'; only heads of cyto_dl or aics_im2im are known",
        ),
        (
            None,
            RES_BLOCKS,
            "_target_ is 'cyto_dl.nn.head.ResBlocksHead'; the checkpoint lacks its weights",
        ),
        (None, shown({"_target_": f"{POSTPROCESSING}InstanceSegCluster"}), "InstanceSegCluster"),
        (None, shown({"activation": {"_target_": "torch.nn.Tanh"}}), "torch.nn.Tanh"),
        (None, shown(SIGMOID | {"ch": 0}), "ch is 0; expected -1 for all channels, or one from 1"),
        (None, shown(SIGMOID | {"ch": 4}), "ch is 4; expected"),
        (
            (1, 1),
            {"_target_": "cyto_dl.nn.head.BaseHead"},
            "outside the backbone (task_heads.seg.1.conv1.conv.weight",
        ),
        ((1, 1), {}, "this one has no name"),
        ((1, 1), RES_BLOCKS | {"resolution": "hr"}, "resolution is 'hr'; only lr is run"),
        ((1, 1), RES_BLOCKS | {"dense": True}, "dense is True; only False is run"),
        (
            (1, 1),
            RES_BLOCKS | {"final_act": {"_target_": "torch.nn.Sigmoid"}},
            "final_act is {'_target_': 'torch.nn.Sigmoid'}",
        ),
        ((1, 1), RES_BLOCKS | {"conv": 1}, "conv is 1; not an argument known here"),
        ((1, 1), RES_BLOCKS | shown(SIGMOID | {"ch": 1}), "ch is 1; only all channels"),
    ],
)
def test_other_heads_are_refused_by_name(layers, described, message, tmp_path):
    content = checkpoint_content(FOUR, heads={"seg": layers})
    content["hyper_parameters"]["task_heads"] = {"seg": described}
    with pytest.raises(BundleError) as caught:
        read_bundle(save(tmp_path / "a.ckpt", content))
    assert message in str(caught.value)


def test_weights_of_a_head_that_nobody_describes(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", heads={"seg": (1, 1)}, hyper_parameters=False)
    assert "no file describes their head" in refusal(path)
    content = checkpoint_content()
    content["state_dict"]["task_heads.seg.model.conv.weight"] = torch.ones(1)
    assert "outside the backbone (task_heads.seg.model.conv.weight)" in refusal(
        save(tmp_path / "b.ckpt", content)
    )
    content = checkpoint_content(heads={"seg": (1, 1)})
    del content["state_dict"]["task_heads.seg.model.model.2.conv.conv.weight"]
    assert "are not of a ResBlocksHead" in refusal(save(tmp_path / "c.ckpt", content))


def test_only_heads_that_predict(tmp_path):
    content = checkpoint_content(heads={"a": (1, 1), "b": None, "c": (0, 1)})
    content["hyper_parameters"]["inference_heads"] = ["c", "b"]
    assert [head.name for head in read_bundle(save(tmp_path / "a.ckpt", content)).heads] == [
        "c",
        "b",
    ]
    content["hyper_parameters"]["inference_heads"] = ["d"]
    assert "inference_heads is ['d']; the heads are a, b, c" in refusal(
        save(tmp_path / "a.ckpt", content)
    )


def test_heads_of_a_configuration(tmp_path):
    """As cyto-dl's experiments write them: pairs whose name is stated elsewhere."""
    config = train_config() | {"target_col": "nuclei"}
    config["model"]["_aux"]["_tasks"] = [
        ["${target_col}", {"postprocess": {"prediction": OTSU}}],
        ["${other}", {}],
    ]
    bundle = read_bundle(write_folder(tmp_path / "x", config=config, hyper_parameters=False))
    assert bundle.heads == (Head("nuclei", threshold="otsu"), Head("unnamed_2"))
    assert bundle.origins["heads"] == "train_config.yaml: model.task_heads"


def test_a_head_of_one_channel(tmp_path):
    content = checkpoint_content(FOUR)
    content["hyper_parameters"]["task_heads"]["seg"]["postprocess"] = {
        "prediction": SIGMOID | {"ch": 2}
    }
    bundle = read_bundle(save(tmp_path / "a.ckpt", content))
    assert bundle.heads == (Head(first=2),)
    patch = torch.rand(1, 2, *PATCH_SHAPE)
    assert torch.equal(build_network(bundle)(patch), seeded_network(FOUR)(patch)[:, 2:3])


# --- what inference_args leave out


@pytest.mark.parametrize(
    ("stated", "window", "overlap", "origin"),
    [
        (
            {"roi_size": [16, 32, 32]},
            "constant",
            0.25,
            "MONAI's default, as a.ckpt: hyper_parameters.inference_args has no",
        ),
        ({"mode": "gaussian"}, "gaussian", 0.25, "a.ckpt: hyper_parameters.inference_args.mode"),
        ({"overlap": 0.5}, "constant", 0.5, "MONAI's default"),
        ({"overlap": 0.5, "mode": "${a}"}, "gaussian", 0.5, "reference value"),
        ({}, "gaussian", 0.25, "reference value"),
    ],
)
def test_what_inference_args_lack_is_monais_default(stated, window, overlap, origin, tmp_path):
    """cyto-dl hands them on to sliding_window_inference, whose own defaults then hold."""
    bundle = load_bundle(
        write_checkpoint(tmp_path / "a.ckpt", hyper_parameters={"inference_args": stated})
    )
    assert (bundle.window, bundle.overlap) == (window, (overlap,) * 3)
    assert bundle.origins["window"].startswith(origin)


@pytest.mark.parametrize(
    ("stated", "precision"),
    [
        (16, "fp16"),
        ("16-mixed", "fp16"),
        ("bf16-mixed", "bf16"),
        (32, "fp32"),
        ("32-true", "fp32"),
        ("64-true", None),
    ],
)
def test_precision(stated, precision, tmp_path):
    config = train_config() | {"trainer": {"precision": stated}}
    bundle = load_bundle(write_folder(tmp_path / "x", config=config))
    told = f"reference value (train_config.yaml: trainer.precision is {stated!r})"
    assert bundle.precision == (precision or "fp32")
    assert bundle.origins["precision"] == (
        "train_config.yaml: trainer.precision" if precision else told
    )


# --- preprocessing


NORMALIZE = {
    "_target_": "monai.transforms.NormalizeIntensityd",
    "keys": "raw",
    "channel_wise": True,
}
RANGE = {
    "_target_": "monai.transforms.ScaleIntensityRanged",
    "keys": "raw",
    "a_min": 100,
    "a_max": 1100,
}
TENSOR = {"_target_": "monai.transforms.ToTensord", "keys": "raw"}


def transforms_of(folder, *transforms, network: NetworkSpec = TINY):
    config = {"data": {"transforms": {"predict": {"transforms": list(transforms)}}}}
    return write_folder(folder / "x", network, config=config)


@pytest.mark.parametrize(
    ("transforms", "steps"),
    [
        ([NORMALIZE], [Step("zscore")]),
        ([{"_target_": "monai.transforms.intensity.array.NormalizeIntensity"}], [Step("zscore")]),
        ([NORMALIZE | {"subtrahend": None, "divisor": None}], [Step("zscore")]),
        ([NORMALIZE, TENSOR | {"dtype": "float16"}], [Step("zscore")]),
        (
            [NORMALIZE | {"subtrahend": [100], "divisor": [20.5]}],
            [Step("subtract_divide", (100, 20.5))],
        ),
        (
            [NORMALIZE | {"channel_wise": False, "subtrahend": 7, "divisor": 0}],
            [Step("subtract_divide", (7, 1))],
        ),
        ([RANGE], [Step("rescale", (100, 1100, 0, 1))]),
        (
            [RANGE | {"b_min": -1, "b_max": 1, "clip": True}],
            [Step("rescale", (100, 1100, -1, 1)), Step("clip", (-1, 1))],
        ),
        ([NORMALIZE, NORMALIZE], [Step("zscore")] * 2),
        ([TENSOR], []),
        ([], []),
    ],
)
def test_transforms_become_steps(transforms, steps, tmp_path):
    path = transforms_of(tmp_path, *transforms)
    bundle = read_bundle(path)
    assert bundle.preprocessing == Preprocessing(tuple(steps))
    assert (
        bundle.origins["preprocessing"] == "train_config.yaml: data.transforms.predict.transforms"
    )
    reference = read_bundle(transforms_of(tmp_path / "reference", NORMALIZE))
    assert (bundle.digest == reference.digest) == (steps == [Step("zscore")])
    if Step("zscore") in steps[1:]:
        assert (
            f"prepares images by: {bundle.preprocessing}; a zscore is only run as the first step"
            in refusal(path)
        )
    else:
        assert load_bundle(path).digest == bundle.digest


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (
            [{"_target_": "monai.transforms.ScaleIntensityRangePercentilesd"}],
            "ScaleIntensityRangePercentilesd needs percentiles of the volume, which no run takes",
        ),
        (
            [NORMALIZE, {"_target_": "monai.transforms.ClipIntensityPercentilesD"}],
            "ClipIntensityPercentilesD needs percentiles",
        ),
        (
            [{"_target_": "monai.transforms.ScaleIntensityd"}],
            "needs minimum and maximum of the volume",
        ),
        (
            [{"_target_": "monai.transforms.Zoomd"}],
            "predict transform Zoomd is not carried out here",
        ),
        (
            [{"_target_": "mine.LoadImaged"}],
            "'mine.LoadImaged' at data.transforms.predict.transforms.0 is none of",
        ),
        (
            [NORMALIZE | {"nonzero": True}],
            "data.transforms.predict.transforms.0.nonzero is True; only False is run",
        ),
        ([NORMALIZE | {"nonzero": "${a}"}], "nonzero cannot be known without computing it"),
        ([NORMALIZE | {"subtrahend": 3}], "subtrahend is 3; only with both subtrahend and divisor"),
        (
            [NORMALIZE | {"subtrahend": [1, 2], "divisor": [1, 1]}],
            "subtrahend is [1, 2]; only one number for all",
        ),
        (
            [NORMALIZE | {"subtrahend": 1, "divisor": "x"}],
            "divisor is 'x'; expected a finite number",
        ),
        ([NORMALIZE | {"dtype": "float16"}], "dtype is 'float16'; only float32"),
        ([NORMALIZE | {"mean": 1}], "mean is 1; not an argument"),
        ([RANGE | {"a_max": 100}], "expected two different numbers a_min and a_max"),
        ([RANGE | {"clip": True}], "clip needs b_min and b_max"),
        (
            [TENSOR | {"dtype": "float16"}, NORMALIZE],
            "transforms.0.dtype is 'float16'; only float32 is run",
        ),
        ([NORMALIZE, TENSOR | {"dtype": "uint8"}], "dtype is 'uint8'"),
        ([{"keys": "raw"}], "predict transform None"),
        ([7], "predict transform None"),
        (["${a}"], "predict transform None"),
        ([TENSOR] * 101, "has 101 transforms; at most 100"),
    ],
)
def test_other_preprocessing_is_refused_by_name(transforms, message, tmp_path):
    assert message in refusal(transforms_of(tmp_path, *transforms))


def test_channels_are_normalised_one_by_one(tmp_path):
    two = replace(TINY, in_channels=2)
    assert (
        read_bundle(transforms_of(tmp_path, NORMALIZE, network=two)).preprocessing
        == Preprocessing()
    )
    with pytest.raises(
        BundleError, match="channel_wise is not True; 2 channels are only normalized one by one"
    ):
        read_bundle(transforms_of(tmp_path, {"_target_": NORMALIZE["_target_"]}, network=two))


@pytest.mark.parametrize(
    ("predict", "written"),
    [
        (
            "${data.transforms.test}",
            " (train_config.yaml: data.transforms.predict is '${data.transforms.test}')",
        ),
        (
            {"transforms": "${eval:a}"},
            " (train_config.yaml: data.transforms.predict.transforms is '${eval:a}')",
        ),
        (None, ""),
    ],
)
def test_unresolved_preprocessing_falls_to_the_reference_and_is_told(predict, written, tmp_path):
    config = {"data": {"transforms": {"predict": predict}}}
    bundle = load_bundle(write_folder(tmp_path / "x", config=config))
    assert bundle.origins["preprocessing"] == f"reference value{written}"


def test_what_would_have_to_be_computed_is_told(tmp_path):
    config = {
        "data": {"_aux": {"patch_shape": "${eval:1}"}},
        "model": {"inference_args": {"roi_size": "${data._aux.patch_shape}", "mode": "${a}"}},
    }
    bundle = load_bundle(write_folder(tmp_path / "x", config=config, hyper_parameters=False))
    assert bundle.patch_shape == (64, 128, 128)
    told = (
        "reference value (train_config.yaml: "
        "model.inference_args.roi_size is '${data._aux.patch_shape}')"
    )
    assert bundle.origins["patch_shape"] == told
    assert (
        bundle.origins["window"]
        == "reference value (train_config.yaml: model.inference_args.mode is '${a}')"
    )


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"transforms": [NORMALIZE]}, ["zscore"]),
        ({"transforms": {"transforms": [NORMALIZE]}}, ["zscore"]),
        (
            {"transforms": [{"_target_": "cyto_dl.image.transforms.clip.Clipd"}]},
            "Clipd needs percentiles",
        ),
        ({"predict_dataloaders": {"dataset": {"transform": [RANGE]}}}, ["rescale"]),
        # Of training only what normalises counts, and only what is for the image.
        (
            {
                "transforms": {
                    "train": {"transforms": [NORMALIZE, {"_target_": "monai.transforms.RandFlipd"}]}
                }
            },
            ["zscore"],
        ),
        (
            {
                "transforms": {
                    "train": {"transforms": [NORMALIZE, RANGE | {"keys": ["label", "${mask}"]}]}
                }
            },
            ["zscore"],
        ),
        (
            {
                "transforms": {
                    "train": {"transforms": [NORMALIZE, RANGE | {"keys": ["label", "raw"]}]}
                }
            },
            ["zscore", "rescale"],
        ),
        (
            {"transforms": {"test": {"transforms": [RANGE]}, "train": {"transforms": [NORMALIZE]}}},
            ["rescale"],
        ),
        (
            {
                "train_dataloaders": {
                    "transforms": [{"_target_": "monai.transforms.ScaleIntensityd"}]
                }
            },
            "needs minimum",
        ),
    ],
)
def test_where_else_a_normalisation_is_stated(data, found, tmp_path):
    config = {
        "data": data,
        "model": {"x_key": "${source_col}"},
        "source_col": "raw",
        "mask": "exclude",
    }
    path = write_folder(tmp_path / "x", config=config)
    if isinstance(found, str):
        assert found in refusal(path)
    else:
        bundle = load_bundle(path)
        assert [step.name for step in bundle.preprocessing.steps] == found
        assert bundle.origins["preprocessing"].startswith("train_config.yaml: data.")


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (5, "data is 5; expected a section"),
        ([RANGE], "data is"),
        ({"transforms": 5}, "data.transforms is 5"),
        ({"transforms": RANGE}, "data.transforms is"),
        ({"transforms": {"predict": RANGE}}, "data.transforms.predict is"),
        (
            {"transforms": {"predict": "foo", "train": {"transforms": [NORMALIZE]}}},
            "data.transforms.predict is 'foo'",
        ),
        (
            {"transforms": {"predict": {"transforms": RANGE}}},
            "data.transforms.predict.transforms is",
        ),
        (
            {"transforms": {"predict": {"transforms": "foo"}}},
            "data.transforms.predict.transforms is 'foo'; expected a",
        ),
        ({"predict_dataloaders": [1]}, "data.predict_dataloaders is"),
        (
            {"predict_dataloaders": {"dataset": {"transform": RANGE}}},
            "data.predict_dataloaders.dataset.transform is",
        ),
    ],
)
def test_transforms_that_are_no_list_are_not_taken_for_none(data, place, tmp_path):
    said = refusal(write_folder(tmp_path / "x", config={"data": data}))
    assert f"train_config.yaml: {place}" in said
    assert "so this model is not run" in said


def test_transforms_may_be_a_list_without_their_container(tmp_path):
    bundle = load_bundle(
        write_folder(tmp_path / "x", config={"data": {"transforms": {"predict": [RANGE]}}})
    )
    assert bundle.preprocessing.steps[0].name == "rescale"


def test_a_checkpoint_named_in_its_folder_keeps_its_configuration(tmp_path):
    folder = transforms_of(tmp_path, RANGE)
    bundle = load_bundle(folder / "checkpoints/epoch_003.ckpt")
    assert bundle.preprocessing.steps == (Step("rescale", (100, 1100, 0, 1)),)
    assert bundle.digest == load_bundle(folder).digest
    (folder / "train_config.yaml").unlink()
    assert load_bundle(folder / "checkpoints/epoch_003.ckpt").preprocessing == Preprocessing()


def test_a_reference_to_other_transforms_is_followed(tmp_path):
    config = {
        "data": {
            "transforms": {"predict": "${data.transforms.test}", "test": {"transforms": [RANGE]}}
        }
    }
    assert (
        read_bundle(write_folder(tmp_path / "x", config=config)).preprocessing.steps[0].name
        == "rescale"
    )


# --- checkpoints of something else


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "train_config.yaml is not YAML"),
        ("\x00", "train_config.yaml is not YAML"),
        ("a: !!int ''", "train_config.yaml is not YAML"),
        ("- 1", "not a configuration but [1]"),
        ("", "not a configuration but None"),
    ],
)
def test_a_configuration_that_is_none(text, message, tmp_path):
    folder = write_folder(tmp_path / "x", hyper_parameters=False)
    (folder / "train_config.yaml").write_text(text)
    assert message in refusal(folder)


def test_a_mac_zip(tmp_path, reference):
    path = write_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/checkpoints/._epoch_650.ckpt", b"x")
        archive.writestr("megaSeg/checkpoints/._epoch_650.ckpt", b"x")
    assert load_bundle(path).digest == reference.digest


# --- saving


def saved(folder, network: NetworkSpec = TINY, **options):
    state = seeded_network(network).state_dict()
    return save_bundle(folder, new_bundle(network), state, **options)


def test_saved_checkpoint_is_what_cyto_dl_reads(tmp_path):
    path = saved(tmp_path)
    assert path == tmp_path / "checkpoints" / "epoch_012.ckpt"
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"] == {
        "backbone": backbone(),
        "inference_args": inference_args(),
    }
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
    network = [load_bundle(tmp_path).origins[argument] for argument in NETWORK_ARGUMENTS]
    assert all(origin.startswith("train_config.yaml: model.backbone.") for origin in network)


def test_saved_configuration_is_where_the_plugin_looks(tmp_path):
    saved(tmp_path)
    text = (tmp_path / "train_config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"]["_aux"] == {"filters": [*TINY.filters], "overlap": OVERLAP}
    assert config["data"]["_aux"] == {"patch_shape": [*PATCH_SHAPE]}
    assert "&" not in text


def test_saving_checks_the_weights(tmp_path):
    with pytest.raises(BundleError, match="do not fit the network"):
        save_bundle(tmp_path / "x", new_bundle(), {})
    assert not (tmp_path / "x").exists()


def test_helper_writes_what_cyto_dl_writes():
    """The keys of cyto-dl's own checkpoints, counted there: 148, of 75 tensors."""
    state = checkpoint_content()["state_dict"]
    assert len(state) == 148
    assert len({tensor.data_ptr() for tensor in state.values()}) == 75
    assert yaml.safe_load(io.StringIO(yaml.safe_dump(train_config())))

"""The network is the one that its numbers describe, and takes only weights and patches that fit."""

import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets.dynunet import DynUNet

from megaseg_dask.errors import BundleError, SettingsError
from megaseg_dask.models import (
    Bundle,
    BundleFacts,
    Head,
    NetworkSpec,
    Preprocessing,
    Step,
    load_bundle,
    require_patch,
    require_runnable,
)
from megaseg_dask.models.build import build_network, fit_weights, with_aliases
from megaseg_dask.models.bundle import content_digest
from megaseg_dask.models.registry import locate
from tests.fixtures.bundles import TINY, one_thread, seeded_network

ANISOTROPIC = NetworkSpec(
    filters=(2, 4, 4),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    kernel_size=((1, 3, 3), (3, 3, 3), (3, 5, 3)),
    upsample_kernel_size=((1, 2, 2), (2, 2, 2)),
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


def bundle_of(network: NetworkSpec = TINY, seed: int = 0) -> Bundle:
    weights = fit_weights(network, seeded_network(network, seed).state_dict())
    bundle = Bundle("test", "", network, weights=weights)
    return replace(bundle, digest=content_digest(bundle))


def shapes_of(network: NetworkSpec) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in seeded_network(network).state_dict().items()}


@pytest.mark.parametrize(
    ("network", "n_parameters"),
    [(NetworkSpec(), 16_670_177), (NetworkSpec(filters=(8, 16, 24, 32, 48)), 372_265)],
)
def test_the_published_sizes(network, n_parameters):
    built = build_network(bundle_of(network))
    assert sum(parameter.numel() for parameter in built.parameters()) == n_parameters


@pytest.mark.parametrize("network", [TINY, ANISOTROPIC, replace(TINY, res_block=False)])
def test_built_network_is_monais(network):
    patch = torch.rand(2, 1, 16, 32, 32)
    built = build_network(bundle_of(network))
    assert torch.equal(built(patch), seeded_network(network)(patch))
    assert not built.training
    assert {p.dtype for p in built.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in built.parameters())


def test_default_filters_are_monais_own():
    arguments = {key: value for key, value in asdict(NetworkSpec()).items() if key != "filters"}
    assert tuple(DynUNet(spatial_dims=3, **arguments).filters) == NetworkSpec().filters


def test_building_leaves_the_random_state_alone():
    bundle, before = bundle_of(), torch.random.get_rng_state()
    build_network(bundle)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "network", [TINY, ANISOTROPIC, replace(TINY, res_block=False), NetworkSpec()]
)
def test_shapes_determine_the_network(network):
    assert NetworkSpec.of_weights(shapes_of(network)) == network


def test_shapes_of_something_else_are_refused():
    with pytest.raises(BundleError, match=r"no input_block\.conv1\.conv\.weight"):
        NetworkSpec.of_weights({"encoder.weight": (3, 3)})
    flat = {key: shape[:-1] for key, shape in shapes_of(TINY).items()}
    with pytest.raises(BundleError, match="not of a 3D network"):
        NetworkSpec.of_weights(flat)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filters": (4, 4)}, "an entry for each of 3 or more levels"),
        ({"strides": ((2, 2, 2),) * 5}, "must begin with"),
        ({"upsample_kernel_size": ((1, 2, 2),) * 4}, "another shape than the input"),
        ({"kernel_size": ((2, 3, 3),) * 5}, "only odd ones"),
        ({"filters": (4, 0, 8, 8, 8)}, "must be positive"),
        (
            {"filters": (4,) * 11, "strides": ((1, 1, 1),) * 11, "kernel_size": ((3, 3, 3),) * 11},
            "10 at most; found 11",
        ),
    ],
)
def test_impossible_networks_are_refused(change, message):
    with pytest.raises(BundleError, match=message):
        replace(TINY, **change)


def test_a_network_that_monai_cannot_build_is_refused():
    strides = ((1, 1, 1), (3, 3, 3), (2, 2, 2))
    thirds = NetworkSpec(
        filters=(2, 2, 2),
        strides=strides,
        kernel_size=((3, 3, 3),) * 3,
        upsample_kernel_size=strides[1:],
    )
    with pytest.raises(BundleError, match="cannot be built: padding value should not be negative"):
        fit_weights(thirds, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_shape": (0, 16, 16)}, "expected positive sizes"),
        ({"overlap": (0.5, 1.0, 0.5)}, "from 0 to below 1"),
        ({"overlap": (0.5, float("nan"), 0.5)}, "from 0 to below 1"),
        ({"window": "triangle"}, "'gaussian' or 'constant'"),
        ({"heads": (Head(channels=2),)}, "its channels are not among the 1 there are"),
        ({"heads": (Head(first=1),)}, "not among the 1"),
        ({"heads": (Head(channels=0),)}, "not among the 1"),
        ({"heads": (Head("a"), Head("a"))}, "two heads are called a"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(BundleError, match=message):
        replace(Bundle("test", "", TINY, weights={}), **change)


def edited(**edits):
    state = dict(seeded_network().state_dict())
    state.update(edits)
    return {key: value for key, value in state.items() if value is not None}


SCALE = "input_block.norm1.weight"
ALIAS = "skip_layers.downsample.norm1.weight"


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({SCALE: None}, rf"1 missing \({SCALE}\)"),
        ({"a": torch.ones(1), "b": torch.ones(1)}, r"2 unexpected \(a, b\)"),
        ({str(i): torch.ones(1) for i in range(4)}, r"4 unexpected \(0, 1, 2, …\)"),
        ({SCALE: torch.ones(5)}, r"has shape \(5,\), the network needs \(4,\)"),
        ({SCALE: torch.full((4,), float("nan"))}, "holds NaN or infinity"),
        ({SCALE: torch.full((4,), 1e300, dtype=torch.float64)}, "holds NaN or infinity"),
        ({SCALE: torch.ones(4, dtype=torch.int64)}, "not a plain tensor of floats"),
        ({SCALE: torch.ones(1).expand(4)}, "not a plain tensor of floats"),
        ({SCALE: torch.ones(4, device="meta")}, "not a plain tensor of floats"),
        ({SCALE: torch.ones(4).to_sparse()}, "not a plain tensor of floats"),
        ({ALIAS: torch.ones(4)}, "one parameter but hold different values"),
    ],
)
def test_weights_that_do_not_fit_are_refused(edits, message):
    with pytest.raises(BundleError, match=message):
        build_network(Bundle("test", "", TINY, weights=edited(**edits)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32_once_each(dtype):
    state = {key: value.to(dtype) for key, value in seeded_network().state_dict().items()}
    weights = fit_weights(TINY, state)
    assert len(weights) == 75
    assert all(torch.equal(tensor, state[key].float()) for key, tensor in weights.items())


def test_aliases_share_their_tensor():
    full = with_aliases(TINY, fit_weights(TINY, seeded_network().state_dict()))
    assert full.keys() == seeded_network().state_dict().keys()
    assert full[ALIAS] is full[SCALE]


def test_digest_covers_everything_that_decides_a_result():
    bundle = bundle_of()
    weights = dict(bundle.weights)
    name = min(weights)
    changed = [
        replace(bundle, patch_shape=(32, 32, 32)),
        replace(bundle, overlap=(0.25, 0.25, 0.5)),
        replace(bundle, window="constant"),
        replace(bundle, network=replace(TINY, res_block=False)),
        replace(bundle, preprocessing=Preprocessing(())),
        replace(bundle, heads=(Head(activation="softmax"),)),
        replace(bundle, heads=(Head("a"), Head("b"))),
        replace(bundle, heads=(Head("b"), Head("a"))),
        replace(
            bundle, weights={**weights, name: torch.nextafter(weights[name], torch.tensor(9.0))}
        ),
        replace(bundle, weights={f"{key}_": value for key, value in weights.items()}),
    ]
    digests = {content_digest(other) for other in [bundle, *changed]}
    assert len(digests) == 1 + len(changed)


def test_digest_leaves_out_name_origins_and_order():
    bundle = bundle_of()
    backwards = dict(reversed(bundle.weights.items()))
    other = replace(bundle, name="other", origins={"overlap": "here"}, weights=backwards)
    assert content_digest(other) == bundle.digest
    told = replace(bundle, heads=(Head("nuclei", threshold="otsu"),), precision="bf16")
    assert content_digest(told) == bundle.digest


def test_digest_of_the_starter_stays():
    """Finished runs have it in their plans; a change would end their resumption."""
    starter = load_bundle(locate("starter"))
    assert starter.digest == "6731892ef62c0081d886f0dea823ce56beba84cc5f4086b9e4d9e08b6a387d2e"


# --- what a run can take


def test_one_head_for_all_channels_unless_said():
    assert BundleFacts("test", "", replace(TINY, out_channels=3)).heads == (Head("seg", 3),)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "a" * 65, "a\nb", " a", "\x1b[2J", 7])
def test_names_of_heads_that_are_no_part_of_a_path(name):
    with pytest.raises(BundleError, match="a task head is called"):
        Head(name)


@pytest.mark.parametrize("name", ["seg", "nuclei_2", "Lamin B1", "核", "0"])
def test_names_of_heads(name):
    assert Head(name).name == name


@pytest.mark.parametrize(
    ("step", "numbers"),
    [("zscore", (1.0,)), ("clip", (0.0,)), ("clip", (0.0, float("inf"))), ("otsu", ())],
)
def test_impossible_steps_are_refused(step, numbers):
    with pytest.raises(BundleError, match="expected one of zscore"):
        Step(step, numbers)


def test_preprocessing_prints_its_steps():
    steps = Step("subtract_divide", (100.0, 2.0)), Step("clip", (-1.0, 1.0))
    assert str(Preprocessing(steps)) == "subtract_divide(100.0, 2.0), clip(-1.0, 1.0)"
    assert str(Preprocessing(())) == "none"


def test_what_a_run_takes():
    bundle, clip = bundle_of(), Step("clip", (0.0, 1.0))
    for steps in ((), (clip,), (Step("zscore"), clip)):
        require_runnable(replace(bundle, preprocessing=Preprocessing(steps)))
    with pytest.raises(
        BundleError,
        match=r"the bundle prepares images by: clip\(0.0, 1.0\), zscore; a zscore is only",
    ):
        require_runnable(replace(bundle, preprocessing=Preprocessing((clip, Step("zscore")))))
    with pytest.raises(BundleError, match="head seg: activation softmax; only a sigmoid is run"):
        require_runnable(replace(bundle, heads=(Head(activation="softmax"),)))


@pytest.mark.parametrize(
    ("network", "patch_shape"),
    [
        (TINY, (16, 16, 32)),
        (TINY, (32, 48, 64)),
        (ANISOTROPIC, (2, 4, 8)),
        (ANISOTROPIC, (6, 4, 4)),
    ],
)
def test_patches_that_a_network_takes(network, patch_shape):
    require_patch(network, patch_shape)
    assert seeded_network(network)(torch.rand(1, 1, *patch_shape)).shape[2:] == patch_shape


@pytest.mark.parametrize(
    ("patch_shape", "message"),
    [
        ((16, 16, 16), r"patch 16,16,16: .* multiples of 16,16,16, .* that works is 16,16,32"),
        ((60, 128, 128), "that works is 64,128,128"),
        ((65, 624, 924), "that works is 64,624,928"),
        ((1, 1, 1), "that works is 16,16,32"),
        ((-16, -16, 32), "that works is 16,16,32"),
        ((64, 64), "that works is 64,64,16"),
        ((1, 64, 64, 64), "that works is 16,64,64"),
    ],
)
def test_patches_that_a_network_cannot_take(patch_shape, message):
    with pytest.raises(SettingsError, match=message):
        require_patch(TINY, patch_shape)


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 20)] * 3))
def test_a_patch_is_taken_exactly_when_the_network_runs(patch_shape):
    try:
        fits = seeded_network(ANISOTROPIC)(torch.rand(1, 1, *patch_shape)).shape[2:] == patch_shape
    except (RuntimeError, ValueError):
        fits = False
    try:
        require_patch(ANISOTROPIC, patch_shape)
    except SettingsError:
        assert not fits
    else:
        assert fits


def test_importing_models_does_not_import_torch():
    code = (
        "import sys, megaseg_dask.models as m; m.NetworkSpec(); "
        "print({'torch', 'monai', 'yaml'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"

"""What a voxel size means for a plan: refusals with the next step, warnings, and what is told."""

import pytest

from megaseg_dask.cli.app import main
from megaseg_dask.errors import SettingsError
from megaseg_dask.models import NewBundle, save_bundle
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.request import plan_runs
from tests.fixtures.bundles import TINY, seeded_network
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SHAPE = (20, 40, 48)


@pytest.fixture
def write(tmp_path):
    """Write an image of a voxel size and return its path."""

    def write(size=(0.29, 0.26, 0.26)):
        scale = dict(zip("zyx", size, strict=True))
        return str(write_image(tmp_path / "image.zarr", blobs(SHAPE), scale=scale))

    return write


@pytest.fixture
def sized(tmp_path):
    """The path of a model that was trained on one voxel size, (0.29, 0.26, 0.26) µm."""
    new = NewBundle(TINY, (16, 32, 32), 0.5, 1, (0.29, 0.26, 0.26))
    save_bundle(tmp_path / "sized", new, seeded_network().state_dict())
    return str(tmp_path / "sized")


def plan_of(source, tmp_path, **options):
    settings = parse_settings({"threads": 1, **options})
    [(plan, _)] = plan_runs(source, str(tmp_path / "out.zarr"), settings)
    return plan


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ((1, 1, 1), {"voxel_size": "model"}, "does not say the voxel size .* give three numbers"),
        ((0, 1, 1), {"voxel_size": (2, 2, 2)}, "z has the scale 0.* write it into its metadata"),
        (
            (1, 1, 1),
            {"voxel_size": (2, 2, 2)},
            r"become \(10, 20, 24\), and the model needs at least",
        ),
        ((1, 1, 1), {"voxel_size": (1e-3, 1e-3, 1e-3)}, "raise --memory|smallest possible block"),
    ],
)
def test_a_size_that_cannot_be_had_is_refused(size, options, message, write, tmp_path, tiny_bundle):
    with pytest.raises(SettingsError, match=message):
        plan_of(write(size), tmp_path, model=str(tiny_bundle), **options)
    assert not (tmp_path / "out.zarr.run").exists()


@pytest.mark.parametrize("text", ["0.5", "modle", "1,1", "1,1,x", "0.5x0.5x0.5"])
def test_a_size_is_three_numbers_or_a_word(text):
    with pytest.raises(SettingsError, match=r"voxel.size.* expected three sizes Z,Y,X in µm"):
        parse_settings({"voxel_size": text})


def test_it_is_told_how_far_the_image_is_from_the_model(write, tmp_path, sized):
    told = summarize(plan_of(write(), tmp_path, model=sized))
    assert told["times_model_voxel"] == (1, 1, 1)
    assert (told["warnings"], told["is_resampled"]) == ([], False)
    source = write((0.29, 0.13, 0.52))
    told = summarize(plan_of(source, tmp_path, model=sized))
    [warning] = told["warnings"]
    assert "are 1 × 0.5 × 2 times those that sized was trained on" in warning
    told = summarize(plan_of(source, tmp_path, model=sized, voxel_size="model"))
    assert (told["grid_shape"], told["is_resampled"]) == ((20, 20, 96), True)
    assert told["warnings"] == []
    assert told["options"]["voxel_size"] == [0.29, 0.26, 0.26]


@pytest.mark.parametrize(
    ("size", "is_warned"),
    [
        ((0.2, 0.2, 0.2), False),
        ((0.6, 0.2, 0.2), False),
        ((0.6, 0.6, 0.6), False),
        ((0.19, 0.2, 0.2), True),
        ((0.6, 0.2, 0.61), True),
    ],
)
def test_sizes_that_the_model_was_trained_on_are_not_far(size, is_warned, write, tmp_path):
    new = NewBundle(TINY, (16, 32, 32), 0.5, 1, (0.3, 0.3, 0.3), ((0.2,) * 3, (0.6,) * 3))
    save_bundle(tmp_path / "ranged", new, seeded_network().state_dict())
    told = summarize(plan_of(write(size), tmp_path, model=str(tmp_path / "ranged")))
    assert len(told["warnings"]) == is_warned


def test_the_model_and_its_numbers_are_one_request(write, tmp_path, cheap_engine, sized):
    source = write((0.29, 0.13, 0.52))
    target = str(tmp_path / "out.zarr")
    common = {"model": sized, "threads": 1}
    first = segment_here(source, target, parse_settings({**common, "voxel_size": "model"}))
    assert (first.status, first.warnings) == ("done", [])
    again = parse_settings({**common, "voxel_size": (0.29, 0.26, 0.26)})
    assert segment_here(source, target, again).already_done
    with pytest.raises(Exception, match=r"voxel.size"):
        segment_here(source, target, parse_settings(common))


def test_the_command_says_it_and_ends_with_2(write, tmp_path, capsys, tiny_bundle, sized):
    target = str(tmp_path / "out.zarr")
    for arguments, code, words in (
        (["--model", sized], 0, "1 × 1 × 1 times the model's"),
        (["--model", str(tiny_bundle)], 0, "the model does not say on which it was trained"),
        (["--model", str(tiny_bundle), "--voxel-size", "model"], 2, "--voxel-size Z,Y,X"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["plan", write(), target, *arguments])
        out = capsys.readouterr()
        assert ended.value.code == code
        assert words in out.out + out.err

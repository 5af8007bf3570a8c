"""What the command writes, read by the field's own libraries.

The same voxels, shapes, scales and units.

ome-zarr-models validates, ngio and ome-zarr-py and bioio-ome-zarr read. None
of them takes part in the reading on the other side: that is zarr alone.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ome_zarr_models
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal

from megaseg_dask.plan.settings import parse_settings
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

SCALE = {"t": 60.0, "c": 1.0, "z": 0.29, "y": 0.108, "x": 0.108}
UNITS = {"t": "second", **dict.fromkeys("zyx", "micrometer")}


@dataclass(frozen=True)
class Case:
    """A source, how it is segmented, and the level shapes ``(z, y, x)`` that have to come out."""

    axes: str
    version: str
    sources: list[tuple[int, int, int]]
    expected: list[tuple[int, int, int]]
    options: dict = field(default_factory=dict)

    @property
    def target_axes(self) -> str:
        return self.axes.replace("c", "")


WHOLE, HALF_DOWN, HALF_UP, ODD = (16, 33, 275), (16, 16, 137), (16, 17, 138), (16, 33, 180)
SPLIT = {"block": (16, 16, 64)}
CASES = {
    "0.5 sharded, levels rounded down": Case("zyx", "0.5", [WHOLE, HALF_DOWN], [WHOLE, HALF_DOWN]),
    "0.5 in blocks, levels rounded up": Case(
        "tzyx", "0.5", [WHOLE, HALF_UP], [WHOLE, HALF_UP], SPLIT
    ),
    "0.5 of one channel, no pyramid": Case(
        "tczyx", "0.5", [WHOLE], [WHOLE, HALF_UP], {"channel": 1}
    ),
    "0.4 in blocks, levels rounded down": Case(
        "zyx", "0.4", [WHOLE, HALF_DOWN], [WHOLE, HALF_DOWN], SPLIT
    ),
    "0.4 over time, no pyramid": Case("tzyx", "0.4", [WHOLE], [WHOLE, HALF_UP]),
    "0.4, levels of no whole factor": Case(
        "czyx", "0.4", [WHOLE, ODD], [WHOLE, ODD], {"channel": 0}
    ),
}
LABELS = ("megaseg", "megaseg_mask")


def source_of(folder: Path, case: Case) -> Path:
    extents = {"t": 2, "c": 2}
    levels = [
        blobs(tuple({**extents, **dict(zip("zyx", s, strict=True))}[a] for a in case.axes))
        for s in case.sources
    ]
    return write_image(folder / "source.zarr", *levels, axes=case.axes, scale=SCALE)


def run(source: Path, target: Path, bundle: Path, **options) -> None:
    settings = parse_settings({"model": str(bundle), "threads": 1, **options})
    result = segment_here(str(source), str(target), settings)
    assert result.status == "done", result.failures


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def written(request, tmp_path_factory, tiny_bundle) -> tuple[Case, Path]:
    """A segmented image with scores, labels and mask."""
    case, folder = request.param, tmp_path_factory.mktemp("written")
    options = {
        "ome_zarr": case.version,
        "outputs": "labels,scores,mask",
        "threshold": 0.45,
        **case.options,
    }
    run(source_of(folder, case), folder / "target.zarr", tiny_bundle, **options)
    return case, folder / "target.zarr"


def images(target: Path) -> list[Path]:
    """The image of scores and both label images."""
    return [target, *(target / "labels" / name for name in LABELS)]


def arrays(image: Path, case: Case) -> list[zarr.Array]:
    return [zarr.open_array(image / str(level), mode="r") for level in range(len(case.expected))]


def expected_shape(case: Case, level: int) -> tuple[int, ...]:
    return (2,) * (len(case.target_axes) - 3) + case.expected[level]


def expected_scale(case: Case, level: int) -> list[float]:
    """The source states the scale of its levels; the levels we add halve."""
    factors = [round(n / m) for n, m in zip(WHOLE, case.expected[level], strict=True)]
    return [SCALE["t"]] * (len(case.target_axes) - 3) + [
        SCALE[a] * f for a, f in zip("zyx", factors, strict=True)
    ]


def test_there_is_something_to_compare(written):
    case, target = written
    scores, labels, mask = (
        [array[...] for array in arrays(image, case)] for image in images(target)
    )
    assert [array.dtype for array in (scores[0], labels[0], mask[0])] == [
        "uint8",
        "uint32",
        "uint8",
    ]
    assert labels[0].max() > 1
    for of_level in zip(scores, labels, mask, strict=True):
        assert all(array.any() for array in of_level)
    assert_array_equal(labels[0] > 0, mask[0] == 1)
    assert set(np.unique(mask[-1])) == {0, 1}
    assert set(np.unique(labels[-1])) <= set(np.unique(labels[0]))


def test_arrays_are_stored_as_the_version_asks(written):
    case, target = written
    for image in images(target):
        for level, array in enumerate(arrays(image, case)):
            assert array.shape == expected_shape(case, level)
            assert array.metadata.zarr_format == (2 if case.version == "0.4" else 3)
            unit = array.shards or array.chunks
            assert set(unit[:-3]) <= {1}
            if case.version == "0.5":
                assert array.metadata.dimension_names == tuple(case.target_axes)
                assert (array.shards is not None) == (
                    "block" not in case.options and array.shape[-1] > 128
                )
            else:
                assert array.metadata.dimension_separator == "/"


def test_ome_zarr_models_finds_every_group_valid(written):
    case, target = written
    package = {"0.4": ome_zarr_models.v04, "0.5": ome_zarr_models.v05}[case.version]
    opened = ome_zarr_models.open_ome_zarr(zarr.open_group(target, mode="r"), version=case.version)
    assert isinstance(opened, package.image.Image)
    for image in images(target):
        model = package.image.Image.from_zarr(zarr.open_group(image, mode="r"))
        ome = model.attributes if case.version == "0.4" else model.attributes.ome
        (multiscale,) = ome.multiscales
        assert [axis.name for axis in multiscale.axes] == list(case.target_axes)
        assert [axis.unit for axis in multiscale.axes] == [UNITS[a] for a in case.target_axes]
        for level, dataset in enumerate(multiscale.datasets):
            assert_allclose(dataset.coordinateTransformations[0].scale, expected_scale(case, level))
    labels = package.labels.Labels.from_zarr(zarr.open_group(target / "labels", mode="r"))
    listed = labels.attributes.labels if case.version == "0.4" else labels.attributes.ome.labels
    assert sorted(listed) == sorted(LABELS)
    for name in LABELS:
        label = package.image_label.ImageLabel.from_zarr(
            zarr.open_group(target / "labels" / name, mode="r")
        )
        ome = label.attributes if case.version == "0.4" else label.attributes.ome
        assert ome.image_label.source.image == "../../"


def test_versions_stand_where_they_belong(written):
    case, target = written
    for path in (*images(target), target / "labels"):
        attributes = zarr.open_group(path, mode="r").attrs.asdict()
        if case.version == "0.5":
            assert attributes["ome"]["version"] == "0.5"
            assert "multiscales" not in attributes
        elif path.name != "labels":
            assert [entry["version"] for entry in attributes["multiscales"]] == ["0.4"]
            assert attributes.get("image-label", {"version": "0.4"})["version"] == "0.4"


def test_ngio_reads_the_same(written):
    import ngio

    case, target = written
    container = ngio.open_ome_zarr_container(target, mode="r")
    assert container.level_paths == [str(i) for i in range(len(case.expected))]
    assert sorted(container.list_labels()) == sorted(LABELS)
    for level in range(len(case.expected)):
        opened = [
            container.get_image(path=str(level)),
            *(container.get_label(n, path=str(level)) for n in LABELS),
        ]
        for image, array in zip(
            opened, (arrays(i, case)[level] for i in images(target)), strict=True
        ):
            assert image.shape == expected_shape(case, level)
            assert_array_equal(image.get_as_numpy(), array[...])
            size = image.pixel_size
            assert_allclose([size.z, size.y, size.x], expected_scale(case, level)[-3:])
            assert size.space_unit == "micrometer"
            assert image.has_axis("t") == ("t" in case.target_axes)


def test_ome_zarr_py_reads_the_same(written):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    case, target = written
    nodes = list(Reader(parse_url(target))())
    found = {
        Path(str(node.zarr.path if hasattr(node.zarr, "path") else node.zarr)).name: node
        for node in nodes
    }
    for image in images(target):
        node = found[image.name]
        assert [axis["name"] for axis in node.metadata["axes"]] == list(case.target_axes)
        for level, (data, array) in enumerate(zip(node.data, arrays(image, case), strict=True)):
            assert_array_equal(data.compute(), array[...])
            assert_allclose(
                node.metadata["coordinateTransformations"][level][0]["scale"],
                expected_scale(case, level),
            )


def test_bioio_reads_the_same(written):
    from bioio_ome_zarr import Reader

    case, target = written
    for image in images(target):
        reader = Reader(str(image))
        assert reader.resolution_levels == tuple(range(len(case.expected)))
        for level, array in enumerate(arrays(image, case)):
            reader.set_resolution_level(level)
            data = reader.get_image_data(case.target_axes.upper())
            assert_array_equal(data, array[...])
            size = reader.physical_pixel_sizes
            assert_allclose([size.Z, size.Y, size.X], expected_scale(case, level)[-3:])


# -- labels into the source itself


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    # zarr writes a group's .zgroup again, with the same bytes, when it sets attributes.
    times = {
        name: 0 if name == "labels/.zgroup" else p.stat().st_mtime_ns for name, p in files.items()
    }
    return {name: (p.read_bytes(), times[name]) for name, p in files.items()}


@pytest.fixture(params=["0.4", "0.5"])
def labelled_source(request, tmp_path) -> tuple[str, Path]:
    """An image that somebody labelled before, with attributes of their own."""
    version = request.param
    path = write_image(
        tmp_path / "source.zarr", blobs((16, 33, 40)), axes="zyx", version=version, scale=SCALE
    )
    group = zarr.open_group(path, mode="r+")
    group.attrs["vendor"] = {"serial": 7}
    write_image(
        path / "labels/cells", np.ones((16, 33, 40), "uint16"), version=version, scale=SCALE
    )
    cells = zarr.open_group(path / "labels/cells", mode="r+")
    # ngio 1.1 takes no label image of 0.4 without this entry, which the specification only
    # recommends.
    cells.attrs.update({"image-label": {"version": "0.4"}} if version == "0.4" else {})
    zarr_format = 2 if version == "0.4" else 3
    labels = zarr.open_group(path / "labels", mode="a", zarr_format=zarr_format)
    labels.attrs.update(
        {"labels": ["cells"]}
        if version == "0.4"
        else {"ome": {"version": "0.5", "labels": ["cells"]}}
    )
    return version, path


def test_labels_in_place_leave_the_source_as_it_was(labelled_source, tiny_bundle):
    import ngio

    version, path = labelled_source
    before = snapshot(path)
    run(path, path, tiny_bundle, outputs="labels", ome_zarr=version, threshold=0.45)
    after = snapshot(path)
    listing = "labels/.zattrs" if version == "0.4" else "labels/zarr.json"
    changed = {name for name in after if after[name] != before.get(name)}
    assert {name for name in changed if not name.startswith("labels/megaseg/")} == {listing}
    assert set(before) <= set(after)
    ome_zarr_models.open_ome_zarr(zarr.open_group(path, mode="r"), version=version)
    container = ngio.open_ome_zarr_container(path, mode="r")
    assert container.list_labels() == ["cells", "megaseg"]
    assert (container.get_label("cells").get_as_numpy() == 1).all()
    assert container.get_label("megaseg").shape == (16, 33, 40)
    assert container.get_label("megaseg").get_as_numpy().max() > 1


def test_labels_in_place_twice_and_under_another_name(labelled_source, tiny_bundle):
    version, path = labelled_source
    before = snapshot(path)
    for name, options in (("a", {}), ("b", {}), ("a", {"overwrite": True, "min_size": 10})):
        run(
            path,
            path,
            tiny_bundle,
            outputs="labels",
            ome_zarr=version,
            label_name=name,
            **options,
        )
    attributes = zarr.open_group(path / "labels", mode="r").attrs.asdict()
    assert sorted(attributes.get("ome", attributes)["labels"]) == ["a", "b", "cells"]
    after = snapshot(path)
    assert {name for name, state in before.items() if after[name] != state} <= {
        "labels/.zattrs",
        "labels/zarr.json",
    }

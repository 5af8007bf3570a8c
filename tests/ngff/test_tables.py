"""Tables on disk.

One Parquet file for a run, and a feature table that ngio reads beside the labels.
"""

from dataclasses import asdict, replace

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from numpy.testing import assert_array_equal

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.algorithms.measurements import columns_of, measure_block, to_columns
from megaseg_dask.errors import StoreError, TargetError
from megaseg_dask.ngff.group import write_group
from megaseg_dask.ngff.labels import add_label
from megaseg_dask.ngff.tables import (
    IMAGE_SCHEMA,
    RUN_SCHEMA,
    ImageTable,
    Place,
    iter_columns,
    run_schema,
    write_rows,
)
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image

SCALE = {"z": 0.5, "y": 0.25, "x": 0.25}

COLUMNS = """
plate:string well:string field:string timepoint:int32 source_timepoint:int32
channel:int32 channel_name:string output:string
label:int64 volume_voxels:int64 volume_um3:double
centroid_z:double centroid_y:double centroid_x:double
centroid_z_um:double centroid_y_um:double centroid_x_um:double
bbox_z_start:int64 bbox_y_start:int64 bbox_x_start:int64
bbox_z_stop:int64 bbox_y_stop:int64 bbox_x_stop:int64
intensity_mean:double intensity_min:double intensity_max:double
intensity_std:double intensity_sum:double
touches_border:bool
extent:double equivalent_diameter_um:double
axis_major_um:double axis_middle_um:double axis_minor_um:double
surface_area_um2:double sphericity:double
""".split()


def measured(n_objects: int, seed: int = 0, dtype: str = "uint16") -> dict:
    """The columns of a volume with this many objects."""
    image = np.random.default_rng(seed).integers(0, 1000, (4, 8, 9)).astype(dtype)
    labels = np.zeros(image.shape, np.uint64)
    labels.ravel()[: 3 * n_objects] = np.repeat(np.arange(1, n_objects + 1) + 2**32, 3)
    return to_columns(
        measure_block(np.pad(labels, 1), image[None], Box.of(labels.shape)),
        labels.shape,
        tuple(SCALE.values()),
    )


def rows_of(volumes) -> dict:
    """What a table of these volumes has to hold."""
    expected: dict = {name: [] for name in RUN_SCHEMA.names}
    for place, columns in volumes:
        n = len(columns["label"])
        for name in asdict(place):
            expected[name] += [getattr(place, name)] * n
        for name, values in columns.items():
            expected[name] += values.tolist()
    return expected


VOLUMES = [
    (Place(t, 1, "plate.zarr", well, field), measured(n, seed=n))
    for well, field, t, n in [
        ("A/1", "0", 0, 3),
        ("A/1", "0", 1, 0),
        ("B/12", "1", 0, 7),
        ("B/12", "1", 5, 40),
    ]
]


def test_the_columns_never_change():
    assert [f"{field.name}:{field.type}" for field in RUN_SCHEMA] == COLUMNS
    in_image = [COLUMNS[3], *COLUMNS[5:7], *COLUMNS[8:]]
    assert [f"{field.name}:{field.type}" for field in IMAGE_SCHEMA] == in_image
    assert [field.name for field in RUN_SCHEMA if field.nullable] == [
        "plate",
        "well",
        "field",
        "channel_name",
        "output",
    ]


@pytest.mark.parametrize("dtype", ["uint16", "int64", "float32"])
@pytest.mark.parametrize("n_objects", [0, 5])
def test_measurements_have_the_types_of_the_columns(dtype, n_objects):
    columns = measured(n_objects, dtype=dtype)
    assert {name: pa.from_numpy_dtype(values.dtype) for name, values in columns.items()} == {
        field.name: field.type
        for field in IMAGE_SCHEMA
        if field.name not in ("timepoint", "channel", "channel_name")
    }
    assert list(columns) == IMAGE_SCHEMA.names[3:]


def test_a_run_reads_back(tmp_path):
    assert write_rows(Location.of(tmp_path), "run.parquet", iter(VOLUMES)) == 50
    found = pq.read_table(tmp_path / "run.parquet")
    assert found.schema == RUN_SCHEMA
    assert found.to_pydict() == rows_of(VOLUMES)


def test_pandas_reads_it_too(tmp_path):
    write_rows(Location.of(tmp_path), "run.parquet", VOLUMES)
    frame = pandas.read_parquet(tmp_path / "run.parquet")
    # What is absent is None, or NaN from pandas 3 on.
    plain = frame.astype(object).where(frame.notna(), None)
    assert plain.to_dict("list") == rows_of(VOLUMES)
    assert frame.dtypes["label"] == np.int64
    assert frame.dtypes["touches_border"] == np.bool_


def test_a_table_of_values_that_are_separated_by_commas_is_the_same(tmp_path):
    folder = Location.of(tmp_path)
    odd = [(replace(VOLUMES[0][0], plate='a "plate", of zarr', well=None), measured(3))]
    assert write_rows(folder, "run.csv", [*VOLUMES, *odd], group_rows=20) == 53
    frame = pandas.read_csv(
        tmp_path / "run.csv",
        dtype={"field": str},
        float_precision="round_trip",
        keep_default_na=False,
        na_values=[""],
    )
    plain = frame.astype(object).where(frame.notna(), None)
    # pandas takes a column without a value for numbers.
    assert plain.to_dict("list") == rows_of([*VOLUMES, *odd])
    names = ("well", "timepoint", "volume_voxels")
    write_rows(folder, "run.parquet", [*VOLUMES, *odd])
    for name in ("run.csv", "run.parquet"):
        columns = [list(column) for column in zip(*iter_columns(folder / name, names), strict=True)]
        found = dict(zip(names, map(np.concatenate, columns), strict=True))
        expected = rows_of([*VOLUMES, *odd])
        assert {key: values.tolist() for key, values in found.items()} == {
            key: expected[key] for key in names
        }


def test_columns_that_some_images_lack_hold_nulls(tmp_path):
    forms = [
        columns_of(size_is_known=False, channels=["RNA"]),
        columns_of(size_is_known=True),
    ]
    schema = run_schema(forms)
    places = [place for place, _ in VOLUMES[:2]]
    tables = [{name: np.ones(2, dtype) for name, dtype in form.items()} for form in forms]
    write_rows(
        Location.of(tmp_path), "run.parquet", zip(places, tables, strict=True), schema=schema
    )
    found = pq.read_table(tmp_path / "run.parquet")
    assert found.column_names == [*RUN_SCHEMA.names, *list(forms[0])[-5:]]
    assert {name: found[name].null_count for name in ("label", "volume_um3", "sphericity")} == {
        "label": 0,
        "volume_um3": 2,
        "sphericity": 2,
    }
    assert found["intensity_std_RNA"].to_pylist() == [1, 1, None, None]


def test_a_plain_image_has_no_plate(tmp_path):
    write_rows(Location.of(tmp_path), "run.parquet", [(Place(0, 0), measured(2))])
    found = pq.read_table(tmp_path / "run.parquet")
    assert found.schema == RUN_SCHEMA
    assert {found[name].null_count for name in ("plate", "well", "field")} == {2}


@pytest.mark.parametrize("volumes", [[], [(Place(0, 0), measured(0))]])
def test_no_objects_make_a_table_without_rows(tmp_path, volumes):
    assert write_rows(Location.of(tmp_path), "run.parquet", volumes) == 0
    assert pq.read_table(tmp_path / "run.parquet").schema == RUN_SCHEMA


def test_small_volumes_share_a_row_group_and_large_ones_have_several(tmp_path):
    sizes = [3, 0, 9, 9, 1, 50, 2]
    volumes = [(Place(t, 0), measured(n, seed=t)) for t, n in enumerate(sizes)]
    write_rows(Location.of(tmp_path), "run.parquet", iter(volumes), group_rows=20)
    metadata = pq.read_metadata(tmp_path / "run.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        20,
        1,
        20,
        20,
        11,
        2,
    ]
    assert pq.read_table(tmp_path / "run.parquet").to_pydict() == rows_of(volumes)


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        pq.ParquetWriter, "write_table", lambda self, rows, *_: written.append(rows.num_rows)
    )
    seen = []

    def volumes():
        for t in range(6):
            seen.append(sum(written))
            yield Place(t, 0), measured(10)

    write_rows(Location.of(tmp_path), "run.parquet", volumes(), group_rows=20)
    assert seen == [0, 0, 20, 20, 40, 40]


def test_a_failure_leaves_the_file_that_was_there(tmp_path):
    folder = Location.of(tmp_path)
    write_rows(folder, "run.parquet", VOLUMES)
    before = (tmp_path / "run.parquet").read_bytes()

    def volumes():
        yield VOLUMES[0]
        raise StoreError("cannot read a part")

    with pytest.raises(StoreError, match="cannot read a part"):
        write_rows(folder, "run.parquet", volumes())
    assert (tmp_path / "run.parquet").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.parquet"]


def test_a_missing_column_is_an_error(tmp_path):
    columns = measured(3)
    del columns["intensity_std"]
    with pytest.raises(KeyError, match="intensity_std"):
        write_rows(Location.of(tmp_path), "run.parquet", [(Place(0, 0), columns)])


# -- tables of images


@pytest.fixture(params=["0.4", "0.5"])
def labelled(request, tmp_path):
    """An image with a label image of the same voxels, and its table written."""
    version = request.param
    image = blobs((16, 33, 40))
    path = write_image(tmp_path / "image.zarr", image, version=version, scale=SCALE)
    write_image(
        path / "labels/nuclei", (image > 1000).astype("uint32"), version=version, scale=SCALE
    )
    label = zarr.open_group(path / "labels/nuclei", mode="r+")
    described = {"image-label": {"version": version}}
    label.attrs.update(
        described if version == "0.4" else {"ome": {**label.attrs["ome"], "image-label": {}}}
    )
    add_label(Location.of(path), version, "nuclei")
    return version, Location.of(path)


def write_table(image, version, volumes, name="nuclei"):
    table = ImageTable(image, name)
    table.write(version, volumes, label_name="nuclei", provenance={"model": "tiny"})


def test_ngio_reads_the_table(labelled):
    import ngio

    version, image = labelled
    columns = measured(11)
    write_table(image, version, [(Place(0, 2), columns)])
    container = ngio.open_ome_zarr_container(image.path, mode="r")
    assert container.list_tables() == ["nuclei"]
    assert container.list_tables(filter_types="feature_table") == ["nuclei"]
    table = container.get_feature_table("nuclei")
    assert table.reference_label == "nuclei"
    assert table.meta.region.path == "../labels/nuclei"
    assert table.meta.instance_key == table.index_key == "label"
    frame = table.dataframe
    assert_array_equal(frame.index, columns["label"])
    for name, values in columns.items():
        if name != "label":
            assert_array_equal(frame[name], values, strict=True)
    assert set(frame["channel"]) == {2}
    assert (
        table.lazy_frame.collect().to_dict(as_series=False)["volume_um3"]
        == columns["volume_um3"].tolist()
    )
    anndata = table.load_as_anndata()
    assert list(anndata.obs_names) == [str(label) for label in columns["label"]]
    assert_array_equal(anndata.to_df()["intensity_mean"], columns["intensity_mean"])
    assert container.get_label(table.reference_label).shape == (16, 33, 40)


def test_ngio_reads_a_table_of_many_timepoints_and_of_none(labelled):
    import ngio

    version, image = labelled
    write_table(image, version, VOLUMES)
    write_table(image, version, [], name="nothing")
    container = ngio.open_ome_zarr_container(image.path, mode="r")
    frame = container.get_feature_table("nuclei").dataframe
    assert (
        frame.reset_index().to_dict("list").items()
        >= {
            name: values
            for name, values in rows_of(VOLUMES).items()
            if name in ("label", "timepoint", "intensity_sum")
        }.items()
    )
    assert len(container.get_feature_table("nothing").dataframe) == 0


def test_the_index_of_many_timepoints_is_unique(labelled):
    import ngio

    version, image = labelled
    times = [(Place(t, 0, channel_name="DNA"), measured(5, seed=t)) for t in range(3)]
    table = ImageTable(image, "nuclei")
    table.write(version, times, label_name="nuclei", provenance={}, has_times=True)
    container = ngio.open_ome_zarr_container(image.path, mode="r")
    frame = container.get_feature_table("nuclei").dataframe
    assert frame.index.is_unique
    assert frame.index[7] == f"1:{2**32 + 3}"
    assert list(frame["label"]) == [2**32 + n for n in range(1, 6)] * 3
    assert set(frame["channel_name"]) == {"DNA"}
    assert [(t, c, len(columns["label"])) for t, c, columns in table.read()] == [
        (t, 0, 5) for t in range(3)
    ]
    anndata = container.get_feature_table("nuclei").load_as_anndata()
    assert anndata.obs_names.is_unique


def test_the_layout_is_that_of_ngio_itself(labelled, tmp_path):
    import ngio
    from ngio.tables import FeatureTable

    version, image = labelled
    write_table(image, version, [(Place(0, 0), measured(2))], name="ours")
    container = ngio.open_ome_zarr_container(image.path, mode="r+")
    frame = pandas.DataFrame({"label": [1, 2], "area": [3.0, 4.0]})
    container.add_table("theirs", FeatureTable(frame, reference_label="nuclei"), backend="parquet")
    folders = {name: image.path / "tables" / name for name in ("ours", "theirs")}
    assert {p.name for p in folders["ours"].iterdir()} == {
        p.name for p in folders["theirs"].iterdir()
    }
    ours, theirs = (
        zarr.open_group(folders[name], mode="r").attrs.asdict() for name in ("ours", "theirs")
    )
    assert ours.pop("megaseg") == {"model": "tiny"}
    assert ours == {name: value for name, value in theirs.items() if value != []}
    assert zarr.open_group(image.path / "tables", mode="r").attrs.asdict() == {
        "tables": ["ours", "theirs"]
    }


def test_other_tables_stay_and_our_own_is_replaced(labelled):
    import ngio

    version, image = labelled
    tables = Location.of(image.path / "tables")
    write_group(tables, version, {"tables": ["rois"]})
    write_group(tables / "rois", version, {"type": "roi_table"})
    for n_objects in (3, 5):
        write_table(image, version, [(Place(0, 0), measured(n_objects))])
    container = ngio.open_ome_zarr_container(image.path, mode="r")
    assert container.list_tables() == ["rois", "nuclei"]
    assert len(container.get_feature_table("nuclei").dataframe) == 5
    before = {path: path.read_bytes() for path in tables.path.rglob("*") if path.is_file()}
    with pytest.raises(TargetError, match="rois is a table that megaseg did not write"):
        write_table(image, version, [(Place(0, 0), measured(3))], name="rois")
    assert {path: path.read_bytes() for path in tables.path.rglob("*") if path.is_file()} == before


def test_a_table_is_listed_when_it_is_complete(labelled):
    version, image = labelled

    def volumes():
        yield Place(0, 0), measured(3)
        raise StoreError("cannot read a part")

    with pytest.raises(StoreError):
        write_table(image, version, volumes())
    assert not (image / "tables").exists()


def test_a_table_of_another_version_is_refused(labelled):
    version, image = labelled
    with pytest.raises(TargetError, match="is a Zarr v"):
        write_table(image, {"0.4": "0.5", "0.5": "0.4"}[version], [])
    assert not (image / "tables").exists()

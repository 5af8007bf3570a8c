"""Units: each name of the specification and each usual spelling is what it says, or unknown."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from scipy import constants

from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.units import meters, micrometers, seconds
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.plan.summary import summarize
from megaseg_dask.run.request import plan_runs
from megaseg_dask.stores import Location
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here

# The lists of OME-Zarr 0.4 and 0.5 (section "axes").
LENGTHS = """
angstrom attometer centimeter decimeter exameter femtometer foot gigameter hectometer inch
kilometer megameter meter micrometer mile millimeter nanometer parsec petameter picometer
terameter yard yoctometer yottameter zeptometer zettameter
""".split()
TIMES = """
attosecond centisecond day decisecond exasecond femtosecond gigasecond hectosecond hour kilosecond
megasecond microsecond millisecond minute nanosecond petasecond picosecond second terasecond
yoctosecond yottasecond zeptosecond zettasecond
""".split()


def by_scipy(unit: str) -> float:
    """What SciPy's tables say of a unit: the oracle."""
    prefix = re.sub("(meter|second)$", "", unit)
    if unit in ("meter", "second"):
        return 1.0
    return float(getattr(constants, unit if prefix == unit else prefix))


@given(st.sampled_from(LENGTHS), st.data())
def test_any_length_of_the_specification_in_any_usual_spelling(unit, data):
    spell = st.sampled_from(
        [str, str.upper, str.title, lambda u: f" {u} ", lambda u: u.replace("meter", "metre")]
    )
    text = data.draw(spell)(unit)
    if unit.endswith(("meter", "angstrom", "yard", "mile", "parsec")):
        text = data.draw(st.sampled_from([text, f"{text.strip()}s"]))
    assert meters(text) == pytest.approx(by_scipy(unit), rel=1e-9, abs=0)
    assert micrometers(text) == pytest.approx(by_scipy(unit) * 1e6, rel=1e-9, abs=0)


@given(st.sampled_from(TIMES))
def test_any_time_of_the_specification(unit):
    assert seconds(unit) == pytest.approx(by_scipy(unit), rel=1e-9, abs=0)
    assert seconds(f"{unit}s") == seconds(unit)
    assert meters(unit) is None


SPELLED = {
    1.0: ["um", "µm", "μm", "micron", "microns", "Microns", "micrometres", "UM", "Um"],
    1e-3: ["nm", "NM", "nanometre"],
    1e3: ["mm"],
    1e4: ["cm", "centimetre"],
    1e-4: ["Å", "Å", "ångström", "Ångström", "angstroms"],
    25400.0: ["in", "in.", '"', "inches"],
    304800.0: ["ft", "feet"],
    1e6: ["m"],
    1e-6: ["pm"],
    1e12: ["Mm"],
}


@pytest.mark.parametrize(("um", "spellings"), SPELLED.items())
def test_symbols_and_other_spellings(um, spellings):
    for spelling in spellings:
        assert micrometers(spelling) == um, spelling


@given(st.text(max_size=12) | st.sampled_from(["pixel", "pixels", "px", "unit", "voxel", "MM", ""]))
def test_what_is_unknown_is_never_taken_for_a_size(text):
    found = micrometers(text)
    known = {word.lower() for words in SPELLED.values() for word in words} | set(LENGTHS)
    if found is not None:
        word = re.sub("metre", "meter", text.strip().rstrip(".").lower())
        prefixed = re.fullmatch("[YZEPTGMkhdcmunpfazyµμ]m", text.strip().rstrip("."))
        assert prefixed or {word, word.removesuffix("s"), text.strip()} & (known | {"yd"})


# -- in tables


def units_of(path, unit: object, scale: float | None = None) -> None:
    """Set the unit, and perhaps the scale, of z."""
    group = zarr.open_group(path, mode="r+")
    ome = group.attrs.asdict()["ome"]
    [axis] = [axis for axis in ome["multiscales"][0]["axes"] if axis["name"] == "z"]
    axis.pop("unit")
    if unit is not None:
        axis["unit"] = unit
    if scale is not None:
        for dataset in ome["multiscales"][0]["datasets"]:
            dataset["coordinateTransformations"][0]["scale"][0] = scale
    group.attrs.put({"ome": json.loads(json.dumps(ome))})


SHAPE = (16, 32, 32)
SCALE = {"z": 3.0, "y": 0.5, "x": 0.5}


def measured(source, target, bundle):
    options = {"model": str(bundle), "outputs": "labels,scores,measurements", "threads": 1}
    settings = parse_settings(options)
    [(plan, _)] = plan_runs(str(source), str(target), settings)
    result = segment_here(str(source), str(target), settings)
    assert result.status == "done", result.failures
    assert summarize(plan)["warnings"] == result.warnings
    run_table = pq.read_table(f"{target}.measurements.parquet")
    image_table = pq.read_table(target / "tables/megaseg/table.parquet")
    return result, run_table, image_table


@pytest.mark.parametrize(("unit", "um"), [("nm", 1e-3), ("µm", 1.0), ("inch", 25400.0)])
def test_a_table_holds_true_micrometers(unit, um, tmp_path, tiny_bundle):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), scale=SCALE)
    units_of(source, unit)
    result, *tables = measured(source, tmp_path / "out.zarr", tiny_bundle)
    assert result.warnings == []
    for table in tables:
        frame = table.to_pandas()
        np.testing.assert_allclose(
            frame["volume_um3"], frame["volume_voxels"] * 3.0 * um * 0.25, rtol=1e-12
        )
        np.testing.assert_allclose(
            frame["centroid_z_um"], frame["centroid_z"] * 3.0 * um, rtol=1e-12
        )
    written = read_image(Location.of(tmp_path / "out.zarr"))
    assert [axis.unit for axis in written.axes] == [unit, "micrometer", "micrometer"]


@pytest.mark.parametrize(
    ("unit", "scale", "reason"),
    [
        ("pixel", None, "z has the unit 'pixel'"),
        (None, None, "z has no unit"),
        ("fathom", None, "z has the unit 'fathom'"),
        ("micrometer", 0.0, "z has the scale 0"),
    ],
)
def test_an_unknown_size_gives_no_micrometers_and_a_warning(
    unit, scale, reason, tmp_path, tiny_bundle
):
    source = write_image(tmp_path / "image.zarr", blobs(SHAPE), scale=SCALE)
    units_of(source, unit, scale)
    result, *tables = measured(source, tmp_path / "out.zarr", tiny_bundle)
    assert reason in result.warnings[0]
    for table in tables:
        assert "volume_voxels" in table.column_names
        assert [name for name in table.column_names if "_um" in name] == []


def test_in_a_plate_only_the_fields_of_unknown_size_lack_them(tmp_path, tiny_bundle):
    from tests.fixtures.plates import FieldSpec, write_fields

    fields = {"A/1/0": FieldSpec(("dna",)), "A/2/0": FieldSpec(("dna",), seed=3)}
    source = write_fields(tmp_path / "plate.zarr", "0.5", fields)
    group = zarr.open_group(source / "A/2/0", mode="r+")
    ome = group.attrs.asdict()["ome"]
    for axis in ome["multiscales"][0]["axes"]:
        axis.pop("unit", None)
    group.attrs.put({"ome": ome})
    options = {"model": str(tiny_bundle), "outputs": "labels,scores,measurements", "threads": 1}
    result = segment_here(str(source), str(tmp_path / "out.zarr"), parse_settings(options))
    assert len(result.warnings) == 1
    frame = pq.read_table(tmp_path / "out.zarr.measurements.parquet").to_pandas()
    is_unknown = frame["well"] == "A/2"
    assert 0 < is_unknown.sum() < len(frame)
    assert (frame["volume_um3"].isna() == is_unknown).all()
    known = frame[~is_unknown]
    np.testing.assert_allclose(known["volume_um3"], known["volume_voxels"] * 0.5 * 0.25 * 0.25)

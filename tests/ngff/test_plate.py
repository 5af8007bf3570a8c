"""Plates: read as they are listed, chosen by name, written whole; no name leads out of them."""

import json
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import tornado.web
import zarr
from hypothesis import given
from hypothesis import strategies as st

from megaseg_dask.errors import SettingsError, SourceError, StoreError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.plate import (
    Acquisition,
    Field,
    Plate,
    is_plate,
    read_plate,
    select_fields,
    write_plate,
)
from megaseg_dask.plan.plate_parts import read_parts
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.stores import Location, StoreOptions, configure
from tests.fixtures.images import blobs, write_image
from tests.fixtures.plates import FieldSpec, write_fields
from tests.fixtures.servers import web_server
from tests.ngff.test_image import places
from tests.stores.test_stores import unreadable

VERSIONS = ["0.4", "0.5"]
BOTH = pytest.mark.parametrize("version", VERSIONS)


def make_plate(path: Path, version: str, listing: object, wells: dict[str, object]) -> Location:
    """Write groups with zarr alone: a listing, and metadata of wells."""
    for place, name, part in (
        ("", "plate", listing),
        *((well, "well", part) for well, part in wells.items()),
    ):
        group = zarr.open_group(
            path / place, mode="w" if not place else "a", zarr_format={"0.4": 2, "0.5": 3}[version]
        )
        group.attrs.put(
            {name: part} if version == "0.4" else {"ome": {"version": version, name: part}}
        )
    return Location.of(path)


def listing_of(*wells: str, rows: str = "AB", columns: str = "123", **others: object) -> dict:
    return {
        "rows": [{"name": name} for name in rows],
        "columns": [{"name": name} for name in columns],
        "wells": [
            {"path": w, "rowIndex": rows.index(w[0]), "columnIndex": columns.index(w[2])}
            for w in wells
        ],
        **others,
    }


def images(*names: str, **others: object) -> dict:
    return {"images": [{"path": name, **others} for name in names]}


# -- written and read back

ALNUM = st.text("ABCxyz0189", min_size=1, max_size=3)
FIELD_NAMES = st.one_of(ALNUM, st.sampled_from(["0_registered", "a-b.c", "000000"]))


@st.composite
def plates(draw) -> Plate:
    rows, columns = (
        tuple(draw(st.lists(ALNUM, min_size=1, max_size=4, unique=True))) for _ in "rc"
    )
    wells = draw(
        st.lists(
            st.tuples(st.sampled_from(rows), st.sampled_from(columns)), min_size=1, unique=True
        )
    )
    ids = draw(st.lists(st.integers(0, 2**40), max_size=3, unique=True))
    names = st.none() | st.text(st.characters(codec="utf-8"), max_size=4)
    acquisitions = tuple(Acquisition(i, draw(names)) for i in ids)
    acquisition = st.sampled_from([None, *ids])
    fields = tuple(
        Field(row, column, name, draw(acquisition))
        for row, column in wells
        for name in draw(st.lists(FIELD_NAMES, min_size=1, max_size=3, unique=True))
    )
    name = draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5))
    return Plate(draw(st.sampled_from(VERSIONS)), name, rows, columns, fields, acquisitions)


@given(plates(), st.sampled_from(VERSIONS))
def test_what_is_written_is_read_back(plate, version):
    with tempfile.TemporaryDirectory() as folder:
        location = Location.of(folder) / "plate.zarr"
        write_plate(location, plate, version)
        assert is_plate(location)
        assert read_plate(location) == replace(plate, version=version)


def some_plate(*wells: str, names: str = "01") -> Plate:
    fields = tuple(Field(*well.split("/"), name, 5) for well in wells for name in names)
    return Plate(
        "0.5", "screen 7", ("A", "B", "C"), ("1", "2", "3"), fields, (Acquisition(5, "day one"),)
    )


@BOTH
def test_only_what_is_in_the_plate_is_written(tmp_path, version):
    write_plate(Location.of(tmp_path / "p.zarr"), some_plate("C/2", "A/1"), version)
    groups = {
        p.parent.relative_to(tmp_path / "p.zarr").as_posix() for p in tmp_path.rglob("zarr.json")
    }
    groups |= {
        p.parent.relative_to(tmp_path / "p.zarr").as_posix() for p in tmp_path.rglob(".zgroup")
    }
    assert groups == {".", "A", "A/1", "C", "C/2"}
    attributes = zarr.open_group(tmp_path / "p.zarr", mode="r").attrs.asdict()
    assert attributes.get("ome", attributes)["plate"] == {
        "version": version,
        "name": "screen 7",
        "rows": [{"name": n} for n in "ABC"],
        "columns": [{"name": n} for n in "123"],
        "wells": [
            {"path": "C/2", "rowIndex": 2, "columnIndex": 1},
            {"path": "A/1", "rowIndex": 0, "columnIndex": 0},
        ],
        "acquisitions": [{"id": 5, "name": "day one", "maximumfieldcount": 2}],
        "field_count": 2,
    }
    assert zarr.open_group(tmp_path / "p.zarr/A", mode="r").attrs.asdict() == {}


@BOTH
def test_foreign_attributes_stay(tmp_path, version):
    location = Location.of(tmp_path / "p.zarr")
    write_plate(location, some_plate("A/1", "B/2"), version)
    for place in ("", "A/1"):
        group = zarr.open_group(tmp_path / "p.zarr" / place, mode="r+")
        group.attrs["vendor"] = {"serial": 7}
        if version == "0.5":
            group.attrs["ome"] = {**group.attrs["ome"], "_creator": "someone"}
    write_plate(location, some_plate("A/1", names="3"), version)
    assert [field.path for field in read_plate(location).fields] == ["A/1/3"]
    for place in ("", "A/1"):
        attributes = zarr.open_group(tmp_path / "p.zarr" / place, mode="r").attrs.asdict()
        assert set(attributes) == {
            "vendor",
            "ome" if version == "0.5" else "well" if place else "plate",
        }
        assert set(attributes.get("ome", {})) <= {"version", "_creator", "plate", "well"}
        assert ("_creator" in attributes.get("ome", {})) == (version == "0.5")


def test_a_plate_without_fields_is_not_written(tmp_path):
    with pytest.raises(SourceError, match="no field to write"):
        write_plate(Location.of(tmp_path / "p.zarr"), replace(some_plate("A/1"), fields=()), "0.5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"rows": ("A", "../B")},
        {"rows": ("A", "")},
        {"columns": ("1", "1")},
        {"rows": ("B",)},
        {"acquisitions": ()},
        {"acquisitions": (Acquisition(5), Acquisition(5))},
        {"fields": (Field("A", "1", "0"), Field("A", "1", "0"))},
        {"fields": (Field("A", "1", ".."),)},
        {"fields": (Field("A", "1", "x/y"),)},
        {"fields": (Field("A", "1", "0\n"),)},
        {"fields": (Field("A", "1", "zarr.json"),)},
    ],
)
def test_a_plate_checks_itself(change):
    with pytest.raises(SourceError):
        replace(some_plate("A/1"), **change)


# -- as others write them


@BOTH
def test_fields_with_and_without_acquisitions(tmp_path, version):
    wells = {
        "A/1": images("0", "1"),
        "B/3": images("0", acquisition=3),
        "A/2": images("7", acquisition=None),
    }
    listing = listing_of(
        "A/1", "B/3", "A/2", acquisitions=[{"id": 1, "name": "first", "starttime": "yesterday"}]
    )
    plate = read_plate(make_plate(tmp_path / "screen.ome.zarr", version, listing, wells))
    assert (plate.version, plate.name) == (version, "screen")
    assert (plate.rows, plate.columns) == (("A", "B"), ("1", "2", "3"))
    assert [(f.path, f.acquisition) for f in plate.fields] == [
        ("A/1/0", None),
        ("A/1/1", None),
        ("B/3/0", 3),
        ("A/2/7", None),
    ]
    assert plate.acquisitions == (Acquisition(1, "first"), Acquisition(3))
    assert plate.missing == ()
    assert plate.wells == ("A/1", "B/3", "A/2")


def test_the_version_may_stand_in_the_listing_or_nowhere(tmp_path):
    for version, key in (("0.4", "0.4"), ("0.4", None)):
        location = make_plate(
            tmp_path / "p", version, listing_of("A/1", version=key), {"A/1": images("0")}
        )
        assert read_plate(location).version == "0.4"
        shutil.rmtree(tmp_path / "p")
    location = make_plate(
        tmp_path / "p", "0.4", listing_of("A/1", version="0.6rc0"), {"A/1": images("0")}
    )
    with pytest.raises(
        SourceError, match=r"is OME-Zarr 0\.6rc0; megaseg reads 0\.4, 0\.5 and 0\.6"
    ):
        read_plate(location)


def test_numbers_of_rows_may_contradict_the_path(tmp_path):
    """As in the example plate of ome-zarr-examples, whose rows and columns are exchanged."""
    listing = listing_of("A/2")
    listing["wells"][0] |= {"rowIndex": 1, "columnIndex": 0}
    plate = read_plate(make_plate(tmp_path / "p", "0.5", listing, {"A/2": images("0")}))
    assert [field.path for field in plate.fields] == ["A/2/0"]


BAD_WELLS = {
    "absent": (None, "but B/2/"),
    "not json": (b"{", "B/2/.*: Expecting"),
    "not text": (b"\xff\xfe\x00", "B/2/.*codec"),
    "a list": (b"[1]", "lists no fields"),
    "deep": (b"[" * 100_000, "B/2/.*recursion"),
    "no metadata": ({}, "lists no fields"),
    "an image": ({"multiscales": [{}]}, "lists no fields"),
    "well is a number": ({"well": 3}, "lists no fields"),
    "no images": ({"well": {}}, "lists no fields"),
    "no fields": ({"well": {"images": []}}, "lists no fields"),
    "images are no list": ({"well": {"images": {"path": "0"}}}, "lists no fields"),
    "a number for a path": (
        {"well": {"images": [{"path": 0}]}},
        "'path': 0.*not in the form of a field",
    ),
    "no path": ({"well": {"images": [{}]}}, "lists {} .*not in the form of a field"),
    "an image is a name": ({"well": {"images": ["0"]}}, "lists '0' .*not in the form of a field"),
    "acquisition as text": (
        {"well": {"images": [{"path": "0", "acquisition": "0"}]}},
        "'acquisition': '0'",
    ),
    "acquisition -1": (
        {"well": {"images": [{"path": "0", "acquisition": -1}]}},
        "'acquisition': -1",
    ),
    "acquisition true": (
        {"well": {"images": [{"path": "0", "acquisition": True}]}},
        "'acquisition': True",
    ),
    "a long text": ({"well": {"images": [{"path": ["0 "] * 9999}]}}, "not in the form of a field"),
}


@BOTH
@pytest.mark.parametrize(("found", "reason"), BAD_WELLS.values(), ids=BAD_WELLS)
def test_a_well_that_cannot_be_read_is_missing_by_name(tmp_path, version, found, reason):
    location = make_plate(
        tmp_path / "p", version, listing_of("A/1", "B/2", "B/3"), {"A/1": images("0")}
    )
    if found is not None:
        (tmp_path / "p/B/2").mkdir(parents=True)
        if isinstance(found, dict):
            found = (
                found
                if version == "0.4"
                else {"zarr_format": 3, "node_type": "group", "attributes": {"ome": found}}
            )
            found = json.dumps(found).encode()
        (tmp_path / "p/B/2" / (".zattrs" if version == "0.4" else "zarr.json")).write_bytes(found)
    shutil.copytree(tmp_path / "p/A/1", tmp_path / "p/B/3")
    plate = read_plate(location)
    assert [field.path for field in plate.fields] == ["A/1/0", "B/3/0"]
    ((well, told),) = plate.missing
    assert well == "B/2"
    assert plate.wells == ("A/1", "B/3", "B/2")
    assert re.search(reason, told), told
    assert "\n" not in told
    assert len(told) < 500


@pytest.mark.parametrize("odd", [{"path": "0"}, {"path": 0}, {"path": "1", "acquisition": -1}, {}])
def test_an_odd_field_is_told_and_the_others_of_its_well_are_there(tmp_path, odd):
    well = {"images": [{"path": "0"}, odd, {"path": "2"}]}
    plate = read_plate(make_plate(tmp_path / "p", "0.5", listing_of("A/1"), {"A/1": well}))
    assert [field.path for field in plate.fields] == ["A/1/0", "A/1/2"]
    ((path, told),) = plate.missing
    assert path == "A/1"
    assert "twice, or not in the form of a field" in told


def test_a_well_that_the_system_cannot_read_is_missing_by_name(tmp_path):
    location = make_plate(tmp_path / "p", "0.5", listing_of("A/1", "B/2"), {"A/1": images("0")})
    unreadable(tmp_path / "p/B/2/zarr.json")
    ((well, told),) = read_plate(location).missing
    assert well == "B/2"
    assert "cannot read" in told


def test_rows_without_groups(tmp_path):
    location = make_plate(tmp_path / "p", "0.5", listing_of("A/1"), {"A/1": images("0")})
    (tmp_path / "p/A/zarr.json").unlink(missing_ok=True)
    assert [field.path for field in read_plate(location).fields] == ["A/1/0"]


# -- hostile


def _with(change):
    listing = listing_of("A/1", "B/2")
    change(listing)
    return listing


def _well(path, row=0, column=0):
    return _with(
        lambda p: p["wells"].append({"path": path, "rowIndex": row, "columnIndex": column})
    )


HOSTILE = {
    "well above": (_well("../A"), "row '..'"),
    "well two above": (_well("../../A/1"), "single '/'"),
    "well of rows that lead out": (
        _with(lambda p: p["rows"].append({"name": ".."})),
        "row '..': a name may hold letters and digits alone",
    ),
    "a row of two words": (
        _with(lambda p: p["rows"].append({"name": "A 1"})),
        "row 'A 1': a name may hold letters and digits alone",
    ),
    "a column with a letter of Greek": (
        _with(lambda p: p["columns"].append({"name": "µ"})),
        "column 'µ': a name",
    ),
    "an empty column": (_with(lambda p: p["columns"].append({"name": ""})), "column ''"),
    "a name that is a number": (_with(lambda p: p["rows"].append({"name": 1})), "must be text"),
    "absolute well": (_well("/etc"), "row ''"),
    "absolute well of an empty row": (
        {
            "rows": [{"name": ""}],
            "columns": [{"name": "1"}],
            "wells": [{"path": "/1", "rowIndex": 0, "columnIndex": 0}],
        },
        "''",
    ),
    "a URL": (_well("file:///etc/passwd"), "single '/'"),
    "backslash": (_well("A\\1"), "single '/'"),
    "control characters": (_well("A/1\nB"), "column '1 B'"),
    "well twice": (_well("A/1"), "well 'A/1' is listed more than once"),
    "row out of range": (_well("A/2", row=2), "well 'A/2' has rowIndex 2"),
    "row far out of range": (_well("A/2", row=10**30), "well 'A/2' has rowIndex 1000"),
    "negative column": (_well("A/2", column=-1), "columnIndex -1"),
    "row as text": (_well("A/2", row="0"), "wells.2.rowIndex"),
    "row twice": (
        _with(lambda p: p["rows"].append({"name": "A"})),
        "row 'A' is listed more than once",
    ),
    "acquisition twice": (
        _with(lambda p: p.update(acquisitions=[{"id": 1}, {"id": 1}])),
        "acquisition 1 is listed",
    ),
    "acquisitions of no kind": (_with(lambda p: p.update(acquisitions=3)), "acquisitions"),
    "no wells": (_with(lambda p: p.update(wells=[])), "lists no wells"),
    "wells of no kind": (_with(lambda p: p.update(wells={"path": "A/1"})), "wells"),
    "no columns": (_with(lambda p: p.pop("columns")), "columns is missing"),
    "a plate of no kind": (7, "columns is missing"),
    "nothing": ({}, "columns is missing"),
}


@BOTH
@pytest.mark.parametrize(("listing", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_listing_that_is_none_is_refused(tmp_path, version, listing, words):
    location = make_plate(
        tmp_path / "p", version, listing, {"A/1": images("0"), "B/2": images("0")}
    )
    assert is_plate(location)
    with pytest.raises(SourceError, match=words) as caught:
        read_plate(location)
    assert str(location) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not re.search(r"should|pydantic|Value error|pattern|\w+\(\w+=", str(caught.value))
    assert len(str(caught.value)) < 1000


@BOTH
@pytest.mark.parametrize(
    "name",
    [
        "../0",
        "..",
        ".",
        "",
        "/etc",
        "a/b",
        "a\\b",
        "0\n",
        ".hidden",
        "zarr.json",
        "s3://b/k",
        "a b",
    ],
)
def test_a_field_that_leads_elsewhere_is_missing_and_the_others_are_there(tmp_path, version, name):
    location = make_plate(tmp_path / "p", version, listing_of("A/1"), {"A/1": images("0", name)})
    plate = read_plate(location)
    assert [field.path for field in plate.fields] == ["A/1/0"]
    ((path, told),) = plate.missing
    assert path == f"A/1/{repr(name)[1:-1]}"
    assert "not a valid name of a row, column or field" in told
    assert path in told
    assert "\n" not in told
    with pytest.raises(SourceError, match="not a valid name of a row, column or field"):
        replace(plate, fields=(Field("A", "1", name),))


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "..", "/", "A/1", "../..", "0", "A"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["path", "name", "id", "ome"]), inner)
    ),
    max_leaves=4,
)


@BOTH
@given(st.data())
def test_damaged_metadata_give_a_plate_or_a_reason(version, data):
    listing = listing_of("A/1", "B/2", acquisitions=[{"id": 1, "name": "x"}], name="p")
    both = {
        "listing": listing,
        "well": {"images": [{"path": "0", "acquisition": 1}, {"path": "1"}]},
    }
    *way, last = data.draw(st.sampled_from([place for place in places(both) if place]))
    part = both
    for key in way:
        part = part[key]
    part[last] = data.draw(ODD)
    plate, reason = None, "plate"
    with tempfile.TemporaryDirectory() as folder:
        location = make_plate(
            Path(folder) / "p", version, both["listing"], {"A/1": both["well"], "B/2": images("0")}
        )
        try:
            plate = read_plate(location)
        except SourceError as error:
            reason = str(error)
    assert plate or str(location) in reason
    assert "\n" not in reason
    for field in plate.fields if plate else ():
        assert re.fullmatch(r"[AB]/[123]/[A-Za-z0-9][A-Za-z0-9._-]*", field.path)
    for path, _ in plate.missing if plate else ():
        assert re.match("A/1|B/2", path)


def _image(path):
    write_image(path, blobs((4, 8, 8)))


NO_PLATE = {
    "nothing": (lambda p: None, "does not exist"),
    "an empty folder": (lambda p: p.mkdir(), "is an empty folder"),
    "an image": (_image, "is an OME-Zarr image"),
    "a file": (lambda p: p.write_bytes(b"II*\0"), "is a TIFF file"),
    "a well": (
        lambda p: zarr.open_group(p, mode="w").attrs.put({"ome": {"well": images("0")}}),
        "is a well of a plate",
    ),
    "a group": (lambda p: zarr.open_group(p, mode="w"), "without multiscales"),
    "a collection": (
        lambda p: zarr.open_group(p, mode="w", zarr_format=2).attrs.put(
            {"bioformats2raw.layout": 3}
        ),
        "is a bioformats2raw collection",
    ),
}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_row_and_a_well_are_told_with_the_plate_to_give(version, tmp_path):
    plate = write_fields(tmp_path / "p.zarr", version, {"A/1/0": FieldSpec(("dna",))})
    with pytest.raises(SourceError, match=rf"row of a plate .*{plate} --wells 'A/\*'\)"):
        read_image(Location.of(plate / "A"))
    with pytest.raises(SourceError, match=rf"well .*{plate} --wells A/1, or .*{plate}/A/1/0\)"):
        read_image(Location.of(plate / "A/1"))
    for document in (plate / "A").glob("*z*"):
        document.unlink()
    with pytest.raises(SourceError, match="is a row of a plate"):
        read_image(Location.of(plate / "A"))


@pytest.mark.parametrize(("make", "words"), NO_PLATE.values(), ids=NO_PLATE)
def test_what_is_no_plate_is_named(tmp_path, make, words):
    make(tmp_path / "p.zarr")
    location = Location.of(tmp_path / "p.zarr")
    assert not is_plate(location)
    with pytest.raises(SourceError, match=words):
        read_plate(location)


# -- choosing

PLATE = Plate(
    "0.5",
    "p",
    ("A", "B"),
    ("1", "03"),
    (
        Field("A", "1", "0", 1),
        Field("A", "1", "x1", 2),
        Field("A", "03", "0", 1),
        Field("B", "03", "0", 1),
        Field("B", "03", "x1", 2),
        Field("B", "03", "5", 2),
    ),
    (Acquisition(1), Acquisition(2, "late")),
    (("B/1", "gone"),),
)
CHOICES = {
    "everything": ({}, [0, 1, 2, 3, 4, 5], True),
    "a well": ({"wells": "A/1"}, [0, 1], False),
    "wells": ({"wells": "A/1, B/03"}, [0, 1, 3, 4, 5], False),
    "a list of wells": ({"wells": ["B/03", "A/1", "A/1"]}, [0, 1, 3, 4, 5], False),
    "a row": ({"wells": "B/*"}, [3, 4, 5], True),
    "a column": ({"wells": "*/03"}, [2, 3, 4, 5], False),
    "all wells": ({"wells": "*/*"}, [0, 1, 2, 3, 4, 5], True),
    "a missing well": ({"wells": "B/1"}, [], True),
    "fields by name": ({"fields": "0"}, [0, 2, 3], True),
    "fields by name and place": ({"fields": "x1,2"}, [1, 4, 5], True),
    "names come first": ({"fields": "5"}, [5], True),
    "fields as numbers": ({"fields": [0, 1]}, [0, 1, 2, 3, 4], True),
    "an acquisition": ({"acquisition": 2}, [1, 4, 5], True),
    "all three": ({"wells": "B/03", "fields": "x1,0", "acquisition": 2}, [4], False),
}


@pytest.mark.parametrize(("choice", "expected", "missing"), CHOICES.values(), ids=CHOICES)
def test_fields_are_chosen(choice, expected, missing):
    chosen = select_fields(PLATE, **choice)
    assert chosen == replace(
        PLATE,
        fields=tuple(PLATE.fields[i] for i in expected),
        missing=PLATE.missing if missing else (),
    )


UNKNOWN = {
    "well": (
        {"wells": "A/1,C/1"},
        "the plate has no well 'C/1'; it has A/1, A/03, B/03, B/1",
    ),
    "column as a number": ({"wells": "A/3"}, r"no well 'A/3' \(did you mean A/03\?\); it has A/1"),
    "row alone": ({"wells": "A"}, r"has no well 'A' \(did you mean A/\*\?\); it has"),
    "well without a slash": ({"wells": "A1"}, r"has no well 'A1' \(did you mean A/1\?\)"),
    "well of an instrument": ({"wells": "b_03"}, r"has no well 'b_03' \(did you mean B/03\?\)"),
    "a pattern": ({"wells": "[AB]/1"}, "has no well '.AB./1'"),
    "no wells": ({"wells": []}, "has no well ''"),
    "empty": ({"wells": ""}, "has no well ''"),
    "a stray comma": ({"wells": "A/1,"}, "has no well ''"),
    "field": ({"fields": "x2"}, "the plate has no field 'x2'; it has 0, x1, 5"),
    "place": ({"fields": "3"}, "has no field '3'"),
    "negative place": ({"fields": [-1]}, "has no field '-1'"),
    "a huge place": ({"fields": "9" * 5000}, "the plate has no"),
    "acquisition": ({"acquisition": 0}, "the plate has no acquisition '0'; it has 1, 2"),
    "nothing of it": ({"wells": "A/03", "fields": "x1"}, "no field of the plate"),
}


@pytest.mark.parametrize(("choice", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_does_not_exist_is_named(choice, words):
    with pytest.raises(SettingsError, match=words):
        select_fields(PLATE, **choice)


def test_a_long_plate_is_not_recited():
    columns = tuple(map(str, range(1, 1001)))
    plate = Plate("0.5", "p", ("A",), columns, tuple(Field("A", c, "0") for c in columns))
    with pytest.raises(SettingsError, match=r"A/12, … \(1000 in all\)$"):
        select_fields(plate, wells="B/1")


def test_the_only_acquisition_owns_what_names_none():
    plate = replace(
        PLATE,
        fields=(Field("A", "1", "0"), Field("A", "1", "1", 1)),
        acquisitions=(Acquisition(1),),
    )
    assert select_fields(plate, acquisition=1) == plate
    with pytest.raises(SettingsError, match="the plate has no acquisition '1'; it has none"):
        select_fields(
            replace(plate, fields=plate.fields[:1], acquisitions=(), missing=()), acquisition=1
        )


def test_wells_of_which_nothing_could_be_read_can_be_chosen():
    plate = replace(PLATE, fields=(), missing=(("A/1", "gone"), ("B/1", "gone")))
    assert select_fields(plate, wells="A/*", fields="0").missing == (("A/1", "gone"),)


@given(plates(), st.data())
def test_chosen_wells_and_the_others_are_the_plate(plate, data):
    chosen = data.draw(st.lists(st.sampled_from(plate.wells), min_size=1, unique=True))
    others = [well for well in plate.wells if well not in chosen]
    parts = [select_fields(plate, wells=wells).fields for wells in (chosen, others) if wells]
    assert sorted(f.path for part in parts for f in part) == sorted(f.path for f in plate.fields)
    assert {field.well for field in parts[0]} == set(chosen)


# -- on other stores


@BOTH
def test_each_well_is_one_request_to_a_web_server_and_nothing_is_listed(tmp_path, version):
    asked: list[str] = []

    class Recorded(tornado.web.StaticFileHandler):
        def prepare(self) -> None:
            asked.append(self.request.path)

    written = some_plate("A/1", "B/2", "C/3")
    write_plate(Location.of(tmp_path / "my plate.zarr"), written, version)
    shutil.rmtree(tmp_path / "my plate.zarr/B/2")
    with web_server([(r"/(.*)", Recorded, {"path": str(tmp_path)})]) as url:
        location = Location.of(f"{url}/my plate.zarr")
        assert is_plate(location)
        plate = read_plate(location)
    assert [field.path for field in plate.fields] == ["A/1/0", "A/1/1", "C/3/0", "C/3/1"]
    assert plate.missing == (
        ("B/2", f"the plate lists this well, but B/2/{key_of(version)} is missing"),
    )
    of_wells = sorted(
        path.removeprefix("/my%20plate.zarr/") for path in asked if "/2/" in path or "/1/" in path
    )
    assert of_wells == [f"A/1/{key_of(version)}", f"B/2/{key_of(version)}"]
    assert not [path for path in asked if path.endswith("/")]


@pytest.mark.parametrize(("status", "lost"), [(403, False), (404, False), (503, True), (500, True)])
def test_a_store_that_is_lost_on_the_way_is_not_a_plate_of_missing_wells(tmp_path, status, lost):
    class Failing(tornado.web.StaticFileHandler):
        def prepare(self) -> None:
            if "/B/2/" in self.request.path:
                raise tornado.web.HTTPError(status)

    write_plate(Location.of(tmp_path / "p.zarr"), some_plate("A/1", "B/2"), "0.5")
    configure(StoreOptions.parse(storage_options=["max_retries=1", "retry_timeout=5"]))
    with web_server([(r"/(.*)", Failing, {"path": str(tmp_path)})]) as url:
        location = Location.of(f"{url}/p.zarr")
        if lost:
            with pytest.raises(StoreError, match=r"cannot read .*/B/2/zarr\.json: "):
                read_plate(location)
        else:
            ((well, reason),) = read_plate(location).missing
            assert (well, "B/2/zarr.json" in reason) == ("B/2", True)


def key_of(version: str) -> str:
    return {"0.4": ".zattrs", "0.5": "zarr.json"}[version]


@BOTH
def test_a_bucket_holds_plates(s3, bucket_folder, version):
    location = Location.of(bucket_folder) / "plate.zarr"
    assert not is_plate(location)
    write_plate(location, some_plate("A/1", "B/2"), version)
    assert read_plate(location) == replace(some_plate("A/1", "B/2"), version=version)


def test_a_choice_in_what_is_not_there(tmp_path):
    settings = parse_settings({"model": "starter", "wells": "A/1"})
    with pytest.raises(SourceError, match="does not exist"):
        read_parts(
            Location.of(tmp_path / "nothing.zarr"), Location.of(tmp_path / "out.zarr"), settings, []
        )


def test_a_plate_in_place_of_an_image_names_a_field_that_it_has(tmp_path):
    plate = Location.of(write_fields(tmp_path / "p.zarr", "0.5", {"A/1/7": FieldSpec()}))
    with pytest.raises(SourceError, match=r"such as .*/p.zarr/A/1/7\)"):
        read_image(plate)
    (tmp_path / "p.zarr/A/1/zarr.json").unlink()
    with pytest.raises(SourceError, match=r"such as .*/p.zarr/A/1/0\)"):
        read_image(plate)

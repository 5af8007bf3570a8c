"""Every example of the NGFF suites, judged by our readers, against a table that says what has to come out.

An example is written as a group of its own, with arrays of a few voxels where it
lists levels, and opened as an image, a plate or a well. Images of the
specification's suites are 2D, which we refuse, and rows and columns of its plates
for 0.4 and 0.6 are exchanged; so each is judged a second time with a z axis (``+z``), or
exchanged back (``+swap``). ``python -m tests.oracle.test_ngff_suites`` writes the
summary, docs/conformance.md.
"""

import copy
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import zarr

from megaseg_dask.errors import SourceError
from megaseg_dask.ngff.image import read_image
from megaseg_dask.ngff.plate import read_plate
from megaseg_dask.stores import Location
from tests.conftest import SHARED

ROOT = SHARED / "omezarr/metadata"
PAGE = Path(__file__).parents[2] / "docs/conformance.md"

# -- the examples


@dataclass(frozen=True)
class Example:
    """Attributes of a group, or a text that is none; what it is said to be, and where it stands."""

    name: str
    data: Any
    kind: str
    valid: bool
    zarr_format: int
    folder: Path

    @property
    def suite(self) -> str:
        top, second = self.name.split("/")[:2]
        if top.startswith("ngff_spec"):
            what = {"+z": ", with a z axis", "ap": ", rows and columns exchanged back"}.get(
                self.name[-2:], ""
            )
            return f"specification {top.removeprefix('ngff_spec_').replace('main', '0.6rc0')}{what}"
        return f"{top.replace('_', '-')} {second}"


def load(path: Path) -> Any:
    """Read JSON with comments, as the specification's examples have them."""
    text = path.read_text()
    bare = re.sub(
        r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', lambda m: m[1] or "", text, flags=re.DOTALL
    )
    try:
        return json.loads(re.sub(r",(\s*[\]}])", r"\1", bare))
    except ValueError:
        return text


def iter_examples() -> Iterator[Example]:
    for path in sorted(ROOT.rglob("*")):
        name = path.relative_to(ROOT).as_posix().replace(" ", "_")
        if path.name != ".zattrs" and (
            path.suffix != ".json" or path.name == ".config.json" or "/schemas/" in name
        ):
            continue
        if name.startswith("yaozarrs/broken/") and path.parent.name != "broken_v05.ome.zarr":
            continue  # One broken store, judged as a whole.
        data = load(path)
        if isinstance(data, dict) and data.get("node_type") == "array":
            continue
        if "_suite.json" not in name:
            yield from variants(
                example_of(name.removesuffix("/zarr.json").removesuffix("/.zattrs"), data, path)
            )
            continue
        names = Counter()
        for case in data["tests"]:
            names[case["formerly"]] += 1
            number = f"#{names[case['formerly']]}" if names[case["formerly"]] > 1 else ""
            title = f"{name.removesuffix('_suite.json')}: {Path(case['formerly']).stem}{number}"
            yield from variants(example_of(title, case["data"], path, case["valid"]))


def example_of(name: str, data: Any, path: Path, valid: bool | None = None) -> Example:
    if isinstance(data, dict):
        data = data.get("attributes", data)
    ome = data.get("ome", data) if isinstance(data, dict) else {}
    if "rows" in ome or "channels" in ome:  # The bare value of a key.
        ome = data = {"plate" if "rows" in ome else "omero": data}
    kinds = ("plate", "well", "multiscales", "image-label", "omero")
    kind = next((key for key in kinds if key in ome), "image" if "image" in path.name else "other")
    v2 = "ome" not in data and not re.search("v0[56]|ngff_spec_(0.5|main)|v0.5", name)
    said = (
        name.endswith("/labels") or "/valid/" in name or not re.search("invalid|broken", name, re.I)
        if valid is None
        else valid
    )
    return Example(name, data, kind, said, 2 if v2 else 3, path.parent)


def variants(example: Example) -> Iterator[Example]:
    """Yield an example, and what it would be without what hides its point from us."""
    yield example
    data = copy.deepcopy(example.data)
    if example.kind == "multiscales" and example.name.startswith("ngff_spec_"):
        entries = [
            entry for entry in data.get("ome", data)["multiscales"] if y_of(entry) is not None
        ]
        for entry in entries:
            add_z(entry, y_of(entry))
        if entries:
            yield replace(example, name=f"{example.name}+z", data=data)
    if example.kind == "plate" and re.match(r"ngff_spec_(0\.4|main)/tests/", example.name):
        names = {"rows": "columns", "columns": "rows"}
        ome = data.get("ome", data)
        ome["plate"] = {names.get(key, key): value for key, value in ome["plate"].items()}
        yield replace(example, name=f"{example.name}+swap", data=data)


def axes_of(entry: dict) -> list[list]:
    """The axes of an image, or those of each of its coordinate systems."""
    systems = entry.get("coordinateSystems", [entry])
    return [system["axes"] for system in systems if isinstance(system.get("axes"), list)]


def y_of(entry: dict) -> int | None:
    named = [[axis.get("name") for axis in axes] for axes in axes_of(entry)]
    if not named or not all("y" in names and "z" not in names for names in named):
        return None
    return named[0].index("y")


def add_z(entry: dict, at: int) -> None:
    n_axes = {len(axes) for axes in axes_of(entry)}

    def add(transform: dict) -> None:
        for key in ("scale", "translation"):
            if len(transform.get(key, [])) in n_axes:
                transform[key].insert(at, 1)
        for part in transform.get("transformations", []):
            add(part)

    for part in (entry, *entry.get("datasets", [])):
        for transform in part.get("coordinateTransformations", []):
            add(transform)
    for axes in axes_of(entry):
        axes.insert(at, {"name": "z", "type": "space"})


# -- the judge


def judge(example: Example, folder: Path) -> str | None:
    """Return why we refuse an example; ``None`` if it is read."""
    data = example.data
    try:
        if example.name.startswith("yaozarrs/broken"):
            assert_reads_in_part(Location.of(example.folder))
        elif example.kind == "plate":
            write_group(folder, example, data)
            read_plate(Location.of(folder))
        elif example.kind == "well":
            write_group(folder, example, plate_around(example))
            write_group(folder / "A/1", example, data)
            plate = read_plate(Location.of(folder))
            assert plate.fields or plate.missing
            return plate.missing[0][1] if plate.missing else None
        else:
            if example.kind in ("image-label", "omero"):
                data = with_multiscales(data)
            write_group(folder, example, data)
            write_levels(folder, example, data)
            read_image(Location.of(folder))
    except SourceError as error:
        return str(error)
    return None


def write_group(folder: Path, example: Example, data: Any) -> None:
    if isinstance(data, str):
        (folder / "zarr.json").write_text(data)
    else:
        zarr.open_group(folder, mode="a", zarr_format=example.zarr_format).attrs.put(data)


def write_levels(folder: Path, example: Example, data: Any) -> None:
    """Write an array for each level: the example's own where it has any."""
    ome = data.get("ome", data) if isinstance(data, dict) else {}
    for entry in ome.get("multiscales", []) if example.kind != "other" else []:
        for dataset in entry.get("datasets", []):
            path = str(dataset.get("path", "0"))
            assert ".." not in path
            own = example.folder / path / (".zarray" if example.zarr_format == 2 else "zarr.json")
            if own.exists():
                (folder / path).mkdir(parents=True)
                shutil.copy(own, folder / path)
            else:
                shape = (4,) * len(next(iter(axes_of(entry)), "zyx"))
                zarr.create_array(
                    folder / path, shape=shape, dtype="u1", zarr_format=example.zarr_format
                )


def plate_around(example: Example) -> dict:
    ome = example.data.get("ome", example.data)
    wells = [{"path": "A/1", "rowIndex": 0, "columnIndex": 0}]
    plate = {"plate": {"rows": [{"name": "A"}], "columns": [{"name": "1"}], "wells": wells}}
    if example.zarr_format == 2:
        return plate
    return {"ome": {**plate, "version": ome.get("version", version_of(example))}}


def version_of(example: Example) -> str:
    return {2: "0.4", 3: "0.6rc0" if "main" in example.name else "0.5"}[example.zarr_format]


def with_multiscales(data: dict) -> dict:
    ome = data.get("ome", data)
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    transforms = [{"type": "scale", "scale": [1, 1, 1]}]
    entry = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
    if str(ome.get("version")).startswith("0.6"):
        transforms[0] |= {"input": {"path": "0"}, "output": {"name": "intrinsic"}}
        entry["coordinateSystems"] = [{"name": "intrinsic", "axes": entry.pop("axes")}]
    ome = {"multiscales": [entry], **ome}
    return {"ome": ome} if "ome" in data else ome


def assert_reads_in_part(location: Location) -> None:
    plate = read_plate(location)
    assert len(plate.missing) == 1
    for field in plate.fields:
        with pytest.raises(SourceError):
            read_image(location / field.path)


# -- what has to come out, and what the message has to say

MESSAGES = {
    "refused: 2D images have no z": "and no z; the model needs 3D volumes",
    "refused: axes other than t, c, z, y and x": "is not one of t, c, z, y, x",
    "refused: invalid": r"(metadata|its plate) are invalid: |lists no fields|not in the form of a field|and no x; "
    r"|without multiscales|is OME-Zarr (foo|0\.3|abc123); megaseg reads 0\.4, 0\.5 and 0\.6|2 dimensions for axes"
    r"|may occur only once|whose metadata cannot be read|is no list of numbers|not a valid name of a row|and no z or ",
    "refused: its rows and columns are exchanged": "in well path .* is not in list of",
    "refused: its scale has fewer numbers than it has axes": "length of axes does not match",
    "refused: a list or a collection, no image": "is (a labels group|a scene|a bioformats2raw collection|a Zarr group without)",
    "refused: a level's transformation is no scale and translation": "has a transformation of type",
    "refused: a transformation alone, no image": "is a Zarr group without multiscales metadata",
}
TABLE: dict[str, dict[str, str]] = {
    "accepted": {
        "ngff_spec_0.*/examples/": """
            bf2raw/plate.json label_strict/colors_properties.json multiscales_strict/multiscales_example.json
            multiscales_strict/multiscales_transformations.json+z plate_strict/plate_2wells.json
            plate_strict/plate_6wells.json well_strict/well_2fields.json well_strict/well_4fields.json
        """,
        "ngff_spec_0.*/tests/image: ": "invalid_axis_units+z missing_name+z",
        "ngff_spec_0.*/tests/label: ": "minimal minimal_properties",
        "ngff_spec_0.*/tests/strict_image: ": """
            multiscales_example multiscales_transformations+z image_metadata+z image+z image_omero
        """,
        "ngff_spec_0.*/tests/strict_well: ": "strict_no_acquisitions strict_acquisitions",
        "ngff_spec_0.*/tests/well: ": "minimal_no_acquisition minimal_acquisitions",
        "ngff_spec_0.4/tests/image: ": "missing_version+z",
        "ngff_spec_0.4/tests/plate: ": """
            minimal_no_acquisitions+swap minimal_acquisitions+swap non_alphanumeric_row+swap
        """,
        "ngff_spec_0.4/tests/strict_plate: ": "strict_no_acquisitions+swap strict_acquisitions+swap",
        "ngff_spec_0.5/tests/image: ": "mismatch_axes_units+z",
        "ngff_spec_0.5/tests/plate: ": "minimal_no_acquisitions minimal_acquisitions non_alphanumeric_row",
        "ngff_spec_0.5/tests/strict_plate: ": "strict_no_acquisitions strict_acquisitions",
        "ome_zarr_examples/valid/": """
            image-03.zarr image-04.zarr plate-01.zarr plate-01.zarr/A/1 plate-01.zarr/A/2 plate-01.zarr/B/1
            plate-01.zarr/B/2
        """,
        "ome_zarr_models/v04/": """
            bioformats2raw_example.json hcs_example.ome.zarr hcs_example.ome.zarr/B/03 hcs_example.ome.zarr/B/03/0
            image_label_example.json multiscales_example.json omero_example.json plate_example_1.json
            plate_example_2.json well_example_1.json well_example_2.json
        """,
        "ome_zarr_models/v05/": """
            bioformats2raw_example.json hcs_example.json image_example.json image_label_example.json
            image_no_version_example.json labels_image_example.json plate_example_1.json plate_example_2.json
            well_example.json
        """,
        "yaozarrs/v04/": """
            2551.zarr 2551.zarr/A/2 2551.zarr/A/2/2 2551.zarr/B/1/3 2551.zarr/B/1/4 2551.zarr/B/2/1 4007801.zarr
            9798462.zarr
        """,
        "yaozarrs/v05/": """
            190129.zarr 1micron_reconstructions_VOI1.zarr 4ffaeed2-fa70-4907-820f-8a96ef683095.zarr
            6001240_labels.zarr/labels/0 6001240_labels.zarr 76-45.ome.zarr/A/1/0 76-45.ome.zarr/A/1
            76-45.ome.zarr/A/2/0 76-45.ome.zarr/A/2 76-45.ome.zarr/B/1/0 76-45.ome.zarr/B/1 76-45.ome.zarr/B/2/0
            76-45.ome.zarr/B/2 76-45.ome.zarr 79ad519b-0aa6-4d64-85a9-6cea2318b980.zarr 9822152.zarr Target-TS.ome.zarr
            c0e5d621-62cc-43a6-9dad-2ddab8959d17.zarr fb416517-e36d-4bdb-98f9-47b644138d47.zarr
        """,
        "ngff_spec_main/examples/": """
            bf2raw/plate.json label_strict/colors_properties.json multiscales_strict/multiscales_example.json
            multiscales_strict/multiscales_example_relative.json
            multiscales_strict/multiscales_reference_to_label.json
            multiscales_strict/multiscales_transformations.json+z plate_strict/plate_2wells.json
            plate_strict/plate_6wells.json well_strict/well_2fields.json well_strict/well_4fields.json
        """,
        "ngff_spec_main/tests/attributes/spec/valid/image/": """
            invalid_axis_units.json+z missing_name.json+z multiscales_transform_additional_transforms.json
            multiscales_transform_additional_transforms_path.json multiscales_transform_identity.json+z
            multiscales_transform_sequence.json
        """,
        "ngff_spec_main/tests/attributes/spec/valid/label/": "minimal.json minimal_properties.json",
        "ngff_spec_main/tests/attributes/spec/valid/plate/": """
            minimal_acquisitions.json+swap minimal_no_acquisitions.json+swap non_alphanumeric_row.json+swap
        """,
        "ngff_spec_main/tests/attributes/spec/valid/transforms/": """
            affine.json+z affineParams.json+z identity.json+z mapAxis.json+z rotation.json+z scale.json+z
        """,
        "ngff_spec_main/tests/attributes/spec/valid/well/": """
            minimal_acquisitions.json minimal_no_acquisition.json minimal_path_special_char.json
        """,
        "ngff_spec_main/tests/attributes/strict/valid/image/": """
            image.json+z image_metadata.json+z image_omero.json multiscales_example.json
            multiscales_transformations.json+z
        """,
        "ngff_spec_main/tests/attributes/strict/valid/plate/": """
            strict_acquisitions.json+swap strict_no_acquisitions.json+swap
        """,
        "ngff_spec_main/tests/attributes/strict/valid/well/": """
            strict_acquisitions.json strict_no_acquisitions.json
        """,
        "ngff_spec_main/tests/zarr/spec/valid/image/": """
            invalid_axis_units.ome.zarr+z missing_name.ome.zarr+z
        """,
        "ngff_spec_main/tests/zarr/spec/valid/label/": "minimal.ome.zarr minimal_properties.ome.zarr",
        "ngff_spec_main/tests/zarr/spec/valid/plate/": """
            minimal_acquisitions.ome.zarr+swap minimal_no_acquisitions.ome.zarr+swap
            non_alphanumeric_row.ome.zarr+swap
        """,
        "ngff_spec_main/tests/zarr/spec/valid/well/": """
            minimal_acquisitions.ome.zarr minimal_no_acquisition.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/strict/valid/image/": """
            image.ome.zarr+z image_metadata.ome.zarr+z image_omero.ome.zarr multiscales_example.ome.zarr
            multiscales_transformations.ome.zarr+z
        """,
        "ngff_spec_main/tests/zarr/strict/valid/plate/": """
            strict_acquisitions.ome.zarr+swap strict_no_acquisitions.ome.zarr+swap
        """,
        "ngff_spec_main/tests/zarr/strict/valid/well/": """
            strict_acquisitions.ome.zarr strict_no_acquisitions.ome.zarr
        """,
        "ome_zarr_models/v06/": """
            bioformats2raw_example.json hcs_example.json image_example.json image_label_example.json
            image_no_version_example.json labels_image_example.json plate_example_1.json plate_example_2.json
            well_example.json
        """,
    },
    "refused: 2D images have no z": {
        "ngff_spec_0.*/examples/": "multiscales_strict/multiscales_transformations.json",
        "ngff_spec_0.*/tests/image: ": """
            invalid_axis_units missing_name invalid_channels_color invalid_channels_window
            empty_transformations
        """,
        "ngff_spec_0.*/tests/strict_image: ": "multiscales_transformations image_metadata image",
        "ngff_spec_0.4/tests/image: ": "missing_version",
        "ngff_spec_0.5/tests/image: ": "mismatch_axes_units",
        "ome_ngff_validator/invalid/": """
            missing_min.zarr missing_min.zarr/labels/coins no_version_v0.4.zarr no_version_v0.5.zarr
        """,
        "ome_zarr_examples/invalid/": "image-03.zarr",
        "ome_zarr_examples/valid/": """
            image-01.zarr image-02.zarr plate-01.zarr/A/1/0 plate-01.zarr/A/2/0 plate-01.zarr/B/1/0 plate-01.zarr/B/2/0
        """,
        "ome_zarr_examples/warning/": "image-01.zarr",
        "yaozarrs/v05/": "ExpD_chicken_embryo_MIP.ome.zarr",
        "ngff_spec_main/examples/": """
            multiscales_strict/multiscales_transformations.json
            transformations/displacements/displacement_field.json
        """,
        "ngff_spec_main/tests/attributes/spec/invalid/image/": """
            invalid_axis_type.json invalid_channels_color.json invalid_channels_window.json
            invalid_multiscale_transform_input.json invalid_multiscale_transform_input_output.json
            invalid_multiscales_transformations.json invalid_path.json missing_path.json missing_scale.json
        """,
        "ngff_spec_main/tests/attributes/spec/invalid/transforms/": """
            bad_affine_no_affine.json bad_affine_no_input_output.json bad_byDimension_no_input_output_axes.json
            bad_byDimension_wrong_axes_type.json bad_mapaxis.json bad_mapaxis2.json bad_mapaxis3.json
            bad_mapaxis4.json bad_mapaxis5.json bad_projectAxis_insert_non_unique.json
            bad_projectAxis_insert_too_high_dim.json bad_projectAxis_insert_too_many.json
            bad_projectAxis_missing_op.json bad_projectAxis_remove_non_unique.json
            bad_projectAxis_remove_too_high_dim.json bad_projectAxis_remove_too_many.json bad_rotation.json
            bad_rotation2.json bad_rotation3.json bad_scale_path_not_allowed.json
            bad_translate_path_not_allowed.json
        """,
        "ngff_spec_main/tests/attributes/spec/valid/image/": """
            invalid_axis_units.json mismatch_axes_units.json missing_name.json multiscales_transform_identity.json
        """,
        "ngff_spec_main/tests/attributes/spec/valid/transforms/": """
            affine.json affineParams.json identity.json mapAxis.json projectAxis.json projectAxis2.json
            rotation.json scale.json
        """,
        "ngff_spec_main/tests/attributes/strict/valid/image/": """
            image.json image_metadata.json multiscales_transformations.json
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/image/": """
            invalid_axis_type.ome.zarr invalid_channels_color.ome.zarr invalid_channels_window.ome.zarr
            invalid_multiscales_transformations.ome.zarr invalid_path.ome.zarr missing_path.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/spec/valid/image/": """
            invalid_axis_units.ome.zarr mismatch_axes_units.ome.zarr missing_name.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/strict/valid/image/": """
            image.ome.zarr image_metadata.ome.zarr multiscales_transformations.ome.zarr
        """,
        "ome_zarr_models/v06/": "stitched_tiles_2d.zarr/tile_0 stitched_tiles_2d.zarr/tile_1",
    },
    "refused: axes other than t, c, z, y and x": {
        "ngff_spec_0.*/tests/image: ": "untyped_axes untyped_axes+z custom_type_axes custom_type_axes+z",
        "ngff_spec_main/examples/": "subspace/subspacePermute.json",
        "ngff_spec_main/tests/attributes/spec/invalid/image/": "too_many_axes.json",
        "ngff_spec_main/tests/attributes/spec/valid/image/": """
            custom_type_axes.json custom_type_axes.json+z untyped_axes.json untyped_axes.json+z
        """,
        "ngff_spec_main/tests/attributes/spec/valid/transforms/": "byDimension.json",
        "ngff_spec_main/tests/zarr/spec/invalid/image/": "too_many_axes.ome.zarr",
        "ngff_spec_main/tests/zarr/spec/valid/image/": """
            custom_type_axes.ome.zarr custom_type_axes.ome.zarr+z untyped_axes.ome.zarr untyped_axes.ome.zarr+z
        """,
    },
    "refused: invalid": {
        "ngff_spec_0.*/tests/image: ": """
            duplicate_axes missing_space_axes invalid_transformation_type invalid_transformation_type+z missing_scale
            missing_scale+z too_many_axes missing_axes_name invalid_axes_count invalid_axes_count+z one_space_axes
            invalid_path invalid_path+z invalid_multiscales_transformations invalid_multiscales_transformations+z
            missing_transformations missing_transformations+z no_datasets no_datasets+z missing_datasets
            missing_datasets+z missing_axes invalid_axis_type invalid_axis_type+z duplicate_scale duplicate_scale+z
            no_axes too_many_space_axes no_multiscales missing_path missing_path+z
        """,
        "ngff_spec_0.*/tests/plate: ": """
            missing_rows duplicate_rows missing_columns duplicate_columns missing_wells empty_wells missing_column_name
            missing_row_name missing_well_path missing_well_rowIndex missing_well_columnIndex well_1group well_3groups
            non_alphanumeric_column missing_acquisition_id non_integer_acquisition_id negative_acquisition_id
        """,
        "ngff_spec_0.*/tests/well: ": "empty_images duplicate_images non_integer_acquisition_id",
        "ngff_spec_0.4/tests/image: ": "invalid_version invalid_version+z",
        "ngff_spec_0.4/tests/plate: ": """
            missing_rows+swap empty_rows+swap duplicate_rows+swap missing_columns+swap empty_columns+swap
            duplicate_columns+swap missing_wells+swap empty_wells+swap duplicate_rows#2 duplicate_rows#2+swap
            missing_column_name+swap missing_row_name+swap missing_well_path+swap missing_well_rowIndex+swap
            missing_well_columnIndex+swap well_1group+swap well_3groups+swap invalid_version invalid_version+swap
            non_alphanumeric_column+swap missing_acquisition_id+swap non_integer_acquisition_id+swap
            negative_acquisition_id+swap
        """,
        "ngff_spec_0.5/tests/plate: ": "empty_rows empty_columns duplicate_wells well_path_has_column_before_row",
        "ome_ngff_validator/invalid/": "invalid_version.zarr",
        "ome_zarr_examples/invalid/": "image-01.zarr image-02.zarr image-04.zarr",
        "ngff_spec_main/tests/attributes/spec/invalid/image/": """
            duplicate_axes.json duplicate_scale.json duplicate_scale.json+z empty_transformations.json
            empty_transformations.json+z invalid_axes_count.json invalid_axes_count.json+z invalid_axis_type.json+z
            invalid_multiscale_transform_output.json invalid_multiscale_transform_output.json+z invalid_path.json+z
            invalid_transformation_type.json invalid_transformation_type.json+z missing_axes_name.json
            missing_coordinate_system_axes.json missing_coordinate_system_name.json missing_coordinate_systems.json
            missing_datasets.json missing_datasets.json+z missing_path.json+z missing_space_axes.json
            missing_transformations.json missing_transformations.json+z no_axes.json no_datasets.json
            no_datasets.json+z no_multiscales.json one_space_axes.json too_many_space_axes.json
        """,
        "ngff_spec_main/tests/attributes/spec/invalid/plate/": """
            duplicate_columns.json duplicate_columns.json+swap duplicate_rows-2.json duplicate_rows-2.json+swap
            duplicate_rows.json duplicate_rows.json+swap empty_wells.json empty_wells.json+swap
            missing_acquisition_id.json missing_acquisition_id.json+swap missing_column_name.json
            missing_column_name.json+swap missing_columns.json missing_columns.json+swap missing_row_name.json
            missing_row_name.json+swap missing_rows.json missing_rows.json+swap missing_well_columnIndex.json
            missing_well_columnIndex.json+swap missing_well_path.json missing_well_path.json+swap
            missing_well_rowIndex.json missing_well_rowIndex.json+swap missing_wells.json missing_wells.json+swap
            negative_acquisition_id.json negative_acquisition_id.json+swap non_alphanumeric_column.json
            non_alphanumeric_column.json+swap non_integer_acquisition_id.json non_integer_acquisition_id.json+swap
            well_1group.json well_1group.json+swap well_3groups.json well_3groups.json+swap
        """,
        "ngff_spec_main/tests/attributes/spec/invalid/well/": """
            duplicate_images.json empty_images.json forbidden_path_1.json forbidden_path_2.json
            forbidden_path_3.json forbidden_path_4.json non_integer_acquisition_id.json
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/image/": """
            duplicate_axes.ome.zarr duplicate_scale.ome.zarr duplicate_scale.ome.zarr+z
            empty_transformations.ome.zarr empty_transformations.ome.zarr+z invalid_axes_count.ome.zarr
            invalid_axes_count.ome.zarr+z invalid_axis_type.ome.zarr+z invalid_path.ome.zarr+z
            invalid_transformation_type.ome.zarr invalid_transformation_type.ome.zarr+z missing_axes.ome.zarr
            missing_axes_name.ome.zarr missing_datasets.ome.zarr missing_datasets.ome.zarr+z missing_path.ome.zarr+z
            missing_scale.ome.zarr missing_scale.ome.zarr+z missing_space_axes.ome.zarr
            missing_transformations.ome.zarr missing_transformations.ome.zarr+z no_axes.ome.zarr
            no_datasets.ome.zarr no_datasets.ome.zarr+z no_multiscales.ome.zarr one_space_axes.ome.zarr
            too_many_space_axes.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/label/": "colors_rgba_length.ome.zarr",
        "ngff_spec_main/tests/zarr/spec/invalid/plate/": """
            duplicate_columns.ome.zarr duplicate_columns.ome.zarr+swap duplicate_rows-2.ome.zarr
            duplicate_rows-2.ome.zarr+swap duplicate_rows.ome.zarr duplicate_rows.ome.zarr+swap empty_wells.ome.zarr
            empty_wells.ome.zarr+swap missing_acquisition_id.ome.zarr missing_acquisition_id.ome.zarr+swap
            missing_column_name.ome.zarr missing_column_name.ome.zarr+swap missing_columns.ome.zarr
            missing_columns.ome.zarr+swap missing_row_name.ome.zarr missing_row_name.ome.zarr+swap
            missing_rows.ome.zarr missing_rows.ome.zarr+swap missing_well_columnIndex.ome.zarr
            missing_well_columnIndex.ome.zarr+swap missing_well_path.ome.zarr missing_well_path.ome.zarr+swap
            missing_well_rowIndex.ome.zarr missing_well_rowIndex.ome.zarr+swap missing_wells.ome.zarr
            missing_wells.ome.zarr+swap negative_acquisition_id.ome.zarr negative_acquisition_id.ome.zarr+swap
            non_alphanumeric_column.ome.zarr non_alphanumeric_column.ome.zarr+swap
            non_integer_acquisition_id.ome.zarr non_integer_acquisition_id.ome.zarr+swap well_1group.ome.zarr
            well_1group.ome.zarr+swap well_3groups.ome.zarr well_3groups.ome.zarr+swap zero_field_count.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/well/": """
            duplicate_images.ome.zarr empty_images.ome.zarr non_integer_acquisition_id.ome.zarr
        """,
    },
    "refused: its rows and columns are exchanged": {
        "ngff_spec_0.4/tests/plate: ": """
            minimal_no_acquisitions minimal_acquisitions empty_rows empty_columns non_alphanumeric_row
            non_integer_acquisition_maximumfieldcount acquisition_zero_maximumfieldcount
            acquisition_noninteger_starttime acquisition_negative_starttime acquisition_noninteger_endtime
            negative_endtime zero_field_count
        """,
        "ngff_spec_0.4/tests/strict_plate: ": """
            strict_no_acquisitions missing_name missing_version strict_acquisitions missing_acquisition_name
            missing_acquisition_maximumfieldcount
        """,
        "ngff_spec_main/tests/attributes/spec/invalid/plate/": """
            acquisition_negative_starttime.json acquisition_noninteger_endtime.json
            acquisition_noninteger_starttime.json acquisition_zero_maximumfieldcount.json empty_columns.json
            empty_columns.json+swap empty_rows.json empty_rows.json+swap negative_endtime.json
            non_integer_acquisition_maximumfieldcount.json zero_field_count.json
        """,
        "ngff_spec_main/tests/attributes/spec/valid/plate/": """
            minimal_acquisitions.json minimal_no_acquisitions.json non_alphanumeric_row.json
        """,
        "ngff_spec_main/tests/attributes/strict/invalid/plate/": """
            missing_acquisition_maximumfieldcount.json missing_acquisition_name.json missing_name.json
        """,
        "ngff_spec_main/tests/attributes/strict/valid/plate/": """
            strict_acquisitions.json strict_no_acquisitions.json
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/plate/": """
            acquisition_negative_starttime.ome.zarr acquisition_noninteger_endtime.ome.zarr
            acquisition_noninteger_starttime.ome.zarr acquisition_zero_maximumfieldcount.ome.zarr
            empty_columns.ome.zarr empty_columns.ome.zarr+swap empty_rows.ome.zarr empty_rows.ome.zarr+swap
            negative_endtime.ome.zarr non_integer_acquisition_maximumfieldcount.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/spec/valid/plate/": """
            minimal_acquisitions.ome.zarr minimal_no_acquisitions.ome.zarr non_alphanumeric_row.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/strict/invalid/plate/": """
            missing_acquisition_maximumfieldcount.ome.zarr missing_acquisition_name.ome.zarr missing_name.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/strict/valid/plate/": """
            strict_acquisitions.ome.zarr strict_no_acquisitions.ome.zarr
        """,
    },
    "refused: its scale has fewer numbers than it has axes": {
        "ngff_spec_0.4/tests/image: ": "mismatch_axes_units mismatch_axes_units+z",
        "ngff_spec_main/examples/": "transformations/displacements/displacement_field.json+z",
        "ngff_spec_main/tests/attributes/spec/valid/image/": "mismatch_axes_units.json+z",
        "ngff_spec_main/tests/zarr/spec/valid/image/": "mismatch_axes_units.ome.zarr+z",
    },
    "refused: a list or a collection, no image": {
        "ngff_spec_0.*/examples/": "bf2raw/image.json ome/series-2.json",
        "ome_ngff_validator/invalid/": "missing_min.zarr/labels",
        "ome_zarr_examples/invalid/": "image-02.zarr/labels image-03.zarr/labels image-04.zarr/labels",
        "ome_zarr_examples/valid/": """
            image-01.zarr/labels image-02.zarr/labels image-03.zarr/labels image-04.zarr/labels
            plate-01.zarr/A/1/0/labels plate-01.zarr/A/2/0/labels plate-01.zarr/B/1/0/labels plate-01.zarr/B/2/0/labels
        """,
        "ome_zarr_examples/warning/": "image-01.zarr/labels",
        "ome_zarr_models/v05/": "labels_example.json",
        "yaozarrs/v04/": "2551.zarr/A/2/3/labels 2551.zarr/A/3/1/labels",
        "yaozarrs/v05/": """
            6001240_labels.zarr/labels EM04534_04_dU_SBF_8bits_aligned_z4-136_7-7-50nm_v3.zarr
            L3_nsybG4xcherryCAAXmerged.ims.zarr Larve_2_20x095_Z1_4096_BAPP_with_cslip.lif.zarr emimmsyn1.zarr
        """,
        "ngff_spec_main/examples/": """
            bf2raw/image.json ome/series-2.json scene/scene_registration.json scene/scene_stitching.json
        """,
        "ngff_spec_main/tests/attributes/spec/invalid/scene/": """
            scene_bijection_forward_missing_params.json scene_bijection_inverse_missing_params.json
            scene_input_output_not_object.json scene_missing_scene.json scene_missing_transformations.json
            scene_missing_version.json
        """,
        "ngff_spec_main/tests/attributes/spec/valid/scene/": "scene.json tile_stitching.json",
        "ome_zarr_models/v06/": "labels_example.json stitched_tiles_2d.zarr",
    },
    "tolerated: a well's own version is not read": {
        "ngff_spec_0.4/tests/strict_well: ": "missing_version",
        "ngff_spec_0.4/tests/well: ": "invalid_version",
    },
    "tolerated: counts and times are not read": {
        "ngff_spec_0.4/tests/plate: ": """
            non_integer_acquisition_maximumfieldcount+swap acquisition_zero_maximumfieldcount+swap
            acquisition_noninteger_starttime+swap acquisition_negative_starttime+swap
            acquisition_noninteger_endtime+swap negative_endtime+swap zero_field_count+swap
        """,
        "ngff_spec_0.5/tests/plate: ": """
            non_integer_acquisition_maximumfieldcount acquisition_zero_maximumfieldcount
            acquisition_noninteger_starttime acquisition_negative_starttime acquisition_noninteger_endtime
            negative_endtime zero_field_count
        """,
        "ngff_spec_main/tests/attributes/spec/invalid/plate/": """
            acquisition_negative_starttime.json+swap acquisition_noninteger_endtime.json+swap
            acquisition_noninteger_starttime.json+swap acquisition_zero_maximumfieldcount.json+swap
            negative_endtime.json+swap non_integer_acquisition_maximumfieldcount.json+swap
            zero_field_count.json+swap
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/plate/": """
            acquisition_negative_starttime.ome.zarr+swap acquisition_noninteger_endtime.ome.zarr+swap
            acquisition_noninteger_starttime.ome.zarr+swap acquisition_zero_maximumfieldcount.ome.zarr+swap
            negative_endtime.ome.zarr+swap non_integer_acquisition_maximumfieldcount.ome.zarr+swap
        """,
    },
    "tolerated: how labels are shown is not read": {
        "ngff_spec_0.*/tests/label: ": """
            empty_colors empty_properties colors_no_label_value properties_no_label_value colors_rgba_length
            colors_rgba_type colors_duplicate
        """,
        "ngff_spec_0.*/tests/strict_label: ": "no_colors",
        "ngff_spec_0.4/tests/strict_label: ": "no_version",
        "ngff_spec_main/tests/attributes/spec/invalid/label/": """
            colors_duplicate.json colors_no_label_value.json colors_rgba_length.json colors_rgba_type.json
            empty_colors.json empty_properties.json properties_no_label_value.json
        """,
        "ngff_spec_main/tests/attributes/strict/invalid/label/": "no_colors.json",
        "ngff_spec_main/tests/zarr/spec/invalid/label/": """
            colors_duplicate.ome.zarr colors_no_label_value.ome.zarr colors_rgba_type.ome.zarr empty_colors.ome.zarr
            empty_properties.ome.zarr properties_no_label_value.ome.zarr
        """,
        "ngff_spec_main/tests/zarr/strict/invalid/label/": "no_colors.ome.zarr",
    },
    "tolerated: a level without transformations has voxels of size 1": {
        "ngff_spec_0.*/tests/image: ": "empty_transformations+z",
        "ngff_spec_main/tests/attributes/spec/invalid/image/": "missing_scale.json+z",
    },
    "tolerated: of channels only the names are read": {
        "ngff_spec_0.*/tests/image: ": "invalid_channels_color+z invalid_channels_window+z",
        "ngff_spec_main/tests/attributes/spec/invalid/image/": """
            invalid_channels_color.json+z invalid_channels_window.json+z
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/image/": """
            invalid_channels_color.ome.zarr+z invalid_channels_window.ome.zarr+z
        """,
    },
    "tolerated: one well is missing by name, the images are refused": {
        "yaozarrs/broken/": "broken_v05.ome.zarr",
    },
    "tolerated: only recommended": {
        "ngff_spec_0.4/tests/strict_plate: ": """
            missing_name+swap missing_version+swap missing_acquisition_name+swap
            missing_acquisition_maximumfieldcount+swap
        """,
        "ngff_spec_0.5/tests/strict_plate: ": """
            missing_name missing_acquisition_name missing_acquisition_maximumfieldcount
        """,
        "ngff_spec_main/tests/attributes/strict/invalid/plate/": """
            missing_acquisition_maximumfieldcount.json+swap missing_acquisition_name.json+swap
            missing_name.json+swap
        """,
        "ngff_spec_main/tests/zarr/strict/invalid/plate/": """
            missing_acquisition_maximumfieldcount.ome.zarr+swap missing_acquisition_name.ome.zarr+swap
            missing_name.ome.zarr+swap
        """,
    },
    "refused: a transformation alone, no image": {
        "ngff_spec_main/examples/": """
            transformations/affine2d2d.json transformations/affine2d2d_with_channel.json
            transformations/affine2d3d.json transformations/bijection.json transformations/bijection_verbose.json
            transformations/byDimension1.json transformations/byDimension2.json
            transformations/byDimensionInvalid1.json transformations/byDimensionInvalid2.json
            transformations/byDimensionXarray.json transformations/displacements/multiscales.json
            transformations/identity.json transformations/mapAxis1.json transformations/projectAxis.json
            transformations/projectAxis2.json transformations/rotation.json transformations/scale.json
            transformations/scale_with_discrete.json transformations/sequence.json
            transformations/sequenceSubspace1.json transformations/translation.json transformations/xarrayLike.json
        """,
    },
    "tolerated: that a level's transformation is of its array is not read": {
        "ngff_spec_main/tests/attributes/spec/invalid/image/": """
            invalid_multiscale_transform_input.json+z invalid_multiscale_transform_input_output.json+z
        """,
    },
    "tolerated: transformations into other coordinate systems are not read": {
        "ngff_spec_main/tests/attributes/spec/invalid/image/": "invalid_multiscales_transformations.json+z",
        "ngff_spec_main/tests/attributes/spec/invalid/transforms/": """
            bad_affine_no_affine.json+z bad_affine_no_input_output.json+z
            bad_byDimension_no_input_output_axes.json+z bad_byDimension_wrong_axes_type.json+z bad_mapaxis.json+z
            bad_mapaxis2.json+z bad_mapaxis3.json+z bad_mapaxis4.json+z bad_mapaxis5.json+z bad_rotation.json+z
            bad_rotation2.json+z bad_rotation3.json+z bad_scale_path_not_allowed.json+z
            bad_translate_path_not_allowed.json+z multiscales_transform_missing_params.json
        """,
        "ngff_spec_main/tests/zarr/spec/invalid/image/": "invalid_multiscales_transformations.ome.zarr+z",
    },
    "refused: a level's transformation is no scale and translation": {
        "ngff_spec_main/tests/attributes/spec/invalid/transforms/": """
            multiscales_transform_forbidden.json multiscales_transform_forbidden2.json
            multiscales_transform_forbidden3.json multiscales_transform_no_input_output.json
            multiscales_transform_no_input_output2.json
        """,
    },
}


def expand() -> dict[str, str]:
    """Return the verdict of each example; ``0.*`` in a prefix is 0.4 and 0.5."""
    expected: dict[str, str] = {}
    for verdict, groups in TABLE.items():
        for prefix, names in groups.items():
            for version in ("0.4", "0.5") if "*" in prefix else ("",):
                for name in names.split():
                    key = prefix.replace("0.*", version) + name
                    assert key not in expected, f"{key} is in the table twice"
                    expected[key] = verdict
    return expected


EXPECTED = expand()


def verdict_of(example: Example) -> str | None:
    return EXPECTED.get(example.name)


EXAMPLES = list(iter_examples()) if ROOT.exists() else []
absent = pytest.mark.skipif(not EXAMPLES, reason=f"the suites are not at {ROOT}")


@absent
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_comes_out_as_the_table_says(example, tmp_path):
    verdict = verdict_of(example)
    assert verdict, f"{example.name} is not in the table"
    reason = judge(example, tmp_path)
    kind = verdict.partition(":")[0]
    assert (kind == "tolerated") <= (not example.valid)
    assert (kind == "accepted") <= example.valid
    if kind == "refused":
        assert reason is not None, "it is read"
        assert re.search(MESSAGES[verdict], reason), reason
        assert "\n" not in reason
        # A well names only itself: the plate is named by whoever reports what is missing of it.
        assert str(tmp_path) in reason or example.kind == "well"
    else:
        assert reason is None


@absent
def test_the_table_names_nothing_else():
    assert not set(EXPECTED) - {example.name for example in EXAMPLES}
    assert len({example.name for example in EXAMPLES}) == len(EXAMPLES)


# -- the page


def page() -> str:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for example in EXAMPLES:
        kind, _, reason = (verdict_of(example) or "").partition(": ")
        said = "valid" if example.valid else "invalid"
        counts[example.suite][f"{said} {kind}"] += 1
        reasons[f"{said} {kind}"][reason] += 1
    columns = ("valid accepted", "valid refused", "invalid refused", "invalid tolerated")
    lines = [
        f"| {' | '.join([suite, *(str(of_suite[c] or '–') for c in columns)])} |"
        for suite, of_suite in counts.items()
    ]
    total = [str(sum(of_suite[c] for of_suite in counts.values())) for c in columns]
    return INTRODUCTION.format(
        table="\n".join([*lines, f"| **all** | {' | '.join(total)} |"]),
        refused=listed(reasons["valid refused"]),
        tolerated=listed(reasons["invalid tolerated"]),
    )


def listed(reasons: Counter[str]) -> str:
    return "\n".join(f"* {reason}: {n}" for reason, n in sorted(reasons.items()))


INTRODUCTION = """# Conformance

What the examples of the NGFF specification and of four other projects become here: as an image, plate or well that is
read, or as an error that says why not. `tests/oracle/test_ngff_suites.py` holds the verdict of every example, and wrote
this page (`python -m tests.oracle.test_ngff_suites`). Most images of the specification's own suites are 2D, and the
rows and columns of its plates for 0.4 and 0.6 are exchanged; both are refused for that. So that this hides nothing, each such
example is judged a second time with a z axis, or with rows and columns where they belong.

| suite | valid: read | valid: refused | invalid: refused | invalid: read |
|---|---|---|---|---|
{table}

Valid, and refused:

{refused}

Invalid, and read all the same, because nothing that is read is wrong:

{tolerated}

Where a plate's `rowIndex` and `columnIndex` contradict a well's path, the path counts. Names of fields may hold `_`,
`-` and `.`, as OME-Zarr 0.6 allows and Fractal writes. Axes may have names in capitals, as iohub writes them. A missing
`version` follows from the Zarr format. A well that cannot be read fails by name; the others are segmented. A path that
would lead out of a plate refuses the plate.

OME-Zarr 0.6 is read and not written (the suites have 0.6rc0 and 0.6.dev4): TARGET is 0.5 or 0.4, and labels cannot be written into a source
of 0.6. The axes of an image are those of the coordinate system that all its levels lead into. The specification calls it
intrinsic, for viewing and processing. Scales, translations, identities and sequences of them are reduced to one scale and one
translation. A level with another transformation is refused, and the transformation is named. Transformations from the intrinsic
system into others (an atlas, a scene, a rotated stage) are not read, so they are no reason to refuse an image.

## Plates of iohub, and ours in iohub and ngio

`tests/slow/test_iohub.py` writes plates with iohub itself: fields of two orders of channels, at five places, one too thin and
one without the channel. Each field that can be done gets what a run on it alone gives, the others are named. It needs environments
with iohub: `MEGASEG_IOHUB=FOLDER MEGASEG_IOHUB_PYTHON=python3.12 pytest -m slow tests/slow/test_iohub.py` makes and keeps them.

| written by | segmented in place | to 0.4 and to 0.5 | TARGET read by iohub 0.3.11 | TARGET read by ngio 1.1 |
|---|---|---|---|---|
| iohub 0.2.3, 0.4 | yes; the plate stays as it is to iohub 0.2.3 | yes | same voxels, sizes and places | same voxels, labels and sizes |
| iohub 0.3.11, 0.4 | yes; the plate stays as it is to iohub 0.3.11 | yes | same voxels, sizes and places | same voxels, labels and sizes |
| iohub 0.3.11, 0.5 | yes; the plate stays as it is to iohub 0.3.11 | yes | same voxels, sizes and places | same voxels, labels and sizes |

ngio refuses iohub's own images, so also labels in place: axes in capitals, and identities of 0.2.3. iohub 0.2.3 finds no field in a
plate whose images have no axis c, as those of one channel.
"""


@absent
def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run: python -m tests.oracle.test_ngff_suites"


if __name__ == "__main__":
    PAGE.write_text(page())

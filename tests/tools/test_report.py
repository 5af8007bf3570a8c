"""The report: one file that opens offline, numbers that the outputs have.

Also a check of seams that finds faults.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest
import zarr
from numpy.testing import assert_array_equal
from skimage.segmentation import find_boundaries
from typer.testing import CliRunner

from megaseg_dask.algorithms.geometry import Box
from megaseg_dask.cli.app import build_app
from megaseg_dask.errors import TargetError
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.journal import Journal
from megaseg_dask.run.request import plan_runs
from megaseg_dask.run.runner import segment
from megaseg_dask.run.status import find_plans
from megaseg_dask.stores import Location
from megaseg_dask.tools.report import pictures
from megaseg_dask.tools.report.charts import Cell, number, plate_map
from megaseg_dask.tools.report.page import (
    Origin,
    Overview,
    Page,
    SeamSection,
    Timings,
    Volumes,
    _unbroken,
    make_page,
    read_template,
    render,
)
from megaseg_dask.tools.report.sampling import choose_view, spread, whole_or_middle
from megaseg_dask.tools.report.survey import Run, survey
from megaseg_dask.tools.report.write import write_report
from tests.fixtures.images import blobs, write_image
from tests.fixtures.runs import segment_here
from tests.run.test_plates import plate  # noqa: F401


class Parsed(HTMLParser):
    """What a page asks for, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.open, self.text, self.without_alt = Counter(), set(), [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.update([found["id"]] if "id" in found else [])
        self.links |= {found[name] for name in ("href", "src") if name in found}
        self.without_alt += tag == "img" and not found.get("alt")
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def options(tiny_bundle) -> dict[str, object]:
    return {
        "model": str(tiny_bundle),
        "threads": 1,
        "overlap": 0,
        "retries": 0,
    }


@pytest.fixture(scope="module")
def split(tmp_path_factory, options, client) -> tuple[Path, Path]:
    """An image in 2x2x2 blocks, segmented by a worker, whose memory is measured."""
    folder = tmp_path_factory.mktemp("split")
    source = write_image(folder / "image.zarr", blobs((40, 64, 100)))
    wanted = {
        **options,
        "block": "20,24,50",
        "outputs": "labels,scores,measurements",
        "min_size": 5,
    }
    result = segment(str(source), str(folder / "out.zarr"), parse_settings(wanted), client=client)
    assert result.status == "done", result.failures
    return source, folder / "out.zarr"


def page_of(target: Path) -> Page:
    return make_page(find_plans(str(target)))


def test_a_place_that_cannot_be_written_is_refused_before_the_page_is_made(split, tmp_path):
    _, target = split
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="cannot be written"):
        write_report(str(target), str(tmp_path / "file/report.html"))


def test_one_file_that_needs_nothing_else(split):
    _, target = split
    place = write_report(str(target))
    assert place.url == f"{target}.report.html"
    text = Path(place.url).read_text()
    page = Parsed(text)
    assert not page.open
    assert page.without_alt == 0
    assert max(page.ids.values()) == 1
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in text
    # How it was made: versions, every setting, what it said, and how long the network was thought
    # to need.
    assert "torch 2" in page.text
    assert "connectivity" in page.text
    assert "out.zarr.run/megaseg/log/0001.txt" in page.text
    timings = page_of(target).timings
    segment_row = next(row for row in timings.stages if row.name == "segment")
    assert segment_row.projected_s > 0
    # And what it took of the store, beside what was projected.
    written = next(row for row in timings.usage if "PUT" in row.name)
    assert 0 < int(written.counted) == pytest.approx(int(written.projected), rel=0.5)


def names_in_template() -> Iterator[list[str]]:
    """Yield the attributes of ``page`` that the template reads, as chains of names."""
    for node in jinja2.Environment().parse(read_template()).find_all(jinja2.nodes.Getattr):
        chain = []
        while isinstance(node, jinja2.nodes.Getattr):
            chain.insert(0, node.attr)
            node = node.node
        if isinstance(node, jinja2.nodes.Name) and node.name == "page":
            yield chain


def test_the_template_reads_all_that_the_page_has_and_nothing_else():
    chains = list(names_in_template())
    assert {chain[0] for chain in chains} == {field.name for field in fields(Page)}
    sections = {
        "overview": Overview,
        "seams": SeamSection,
        "volumes": Volumes,
        "timings": Timings,
        "origin": Origin,
    }
    for name, section in sections.items():
        read = {chain[1] for chain in chains if chain[0] == name and len(chain) > 1}
        assert read == {field.name for field in fields(section)}, name


def test_numbers_are_those_of_the_outputs(split):
    _, target = split
    labels = zarr.open_group(target, mode="r")["labels/megaseg/0"][...]
    scores = zarr.open_group(target, mode="r")["0"][...]
    page = page_of(target)
    report = page.survey.volumes[0]
    assert report.objects == page.overview.n_objects == labels.max()
    assert report.foreground == pytest.approx((labels > 0).mean())
    assert report.mean_score == pytest.approx(scores.mean() / 255)
    assert page.survey.sizes.sum() == labels.max()
    assert page.table.rows[0][page.table.columns.index("label")] == "1"
    assert len(page.table.rows) <= labels.max()
    assert page.survey.scores.sum() == scores.size
    assert page.overview.wall_s > 0
    assert all(0 < stage.peak_bytes <= stage.projected_bytes for stage in page.timings.stages)
    (plan,) = find_plans(str(target))
    # Without the table the same is found in the labels.
    bare = plan.model_copy(
        update={"resolved": replace(plan.resolved, outputs=("labels", "scores"))}
    )
    seen = survey([Run(bare, Journal.read(plan))])
    assert_array_equal(seen.sizes, page.survey.sizes)
    assert seen.volumes[0].foreground == pytest.approx(report.foreground)


def test_the_command_has_the_fingerprint_of_the_run(split):
    source, target = split
    page = page_of(target)
    (command,) = page.origin.commands
    words = shlex.split(command)
    assert words[:4] == ["megaseg", "segment", str(source), str(target)]
    names = [word.removeprefix("--").replace("-", "_") for word in words[4::2]]
    ((plan, journal),) = plan_runs(
        *words[2:4], parse_settings(dict(zip(names, words[5::2], strict=True)))
    )
    assert plan.fingerprint == page.plan.fingerprint
    assert journal.result is not None


def test_seams_are_like_the_inside(split):
    page = page_of(split[1])
    assert page.seams.result.n_checked == page.seams.result.n_faces == 6 + 8 + 6
    assert page.seams.result.n_contacts > 0
    assert page.seams.result.n_broken == 0
    assert {compared.verdict for _, _, compared in page.seams.rows} == {"inside"}
    assert "none of them has" in " ".join(Parsed(render(page.plans)).text.split())


@pytest.mark.parametrize("fault", ["labels", "scores", "cut"])
def test_a_fault_at_a_seam_is_found(fault, split, tmp_path):
    """What a wrong split would leave: other ids, another scale, or background in one block."""
    import shutil

    good = split[1]
    target = tmp_path / "out.zarr"
    shutil.copytree(good, target)
    plan = find_plans(str(good))[0].model_copy(update={"target": Location.of(target)})
    block = (slice(0, 20), slice(24, 48), slice(0, 50))
    array = zarr.open_group(target, mode="r+")["0" if fault == "scores" else "labels/megaseg/0"]
    values = array[block]
    wrong = {"labels": np.where(values, values + 7, 0), "scores": values // 4, "cut": values * 0}
    array[block] = wrong[fault].astype(values.dtype)
    page = make_page([plan])
    assert (page.seams.result.n_broken > 0) == (fault == "labels")
    told = {what for _, what, compared in page.seams.rows if compared.verdict == "more"}
    assert told == {"labels": set(), "scores": {"score step"}, "cut": {"objects end"}}[fault]


def test_faces_where_patches_meet_are_compared_with_such_places(split, options, tmp_path):
    """Without overlap, scores step from patch to patch, in one block as well as at its faces."""
    wanted = parse_settings({**options, "block": "40,64,32"})
    assert segment_here(str(split[0]), str(tmp_path / "out.zarr"), wanted).status == "done"
    page = page_of(tmp_path / "out.zarr")
    (profile,) = page.seams.result.profiles
    assert profile.n_on_borders == profile.n_faces == 3
    step = profile.compare("step")
    assert step.at > step.mean
    assert step.verdict in ("patches", "inside")


def test_a_plate_with_failures(plate, options, tmp_path, cheap_engine):  # noqa: F811
    import shutil

    shutil.rmtree(plate / "B/2/1")
    for chunk in (p for p in (plate / "A/2/0/0").rglob("0/*") if p.is_file()):
        chunk.write_bytes(b"nothing")
    wanted = parse_settings({**options, "channel": "dna,actin"})
    assert segment_here(str(plate), str(tmp_path / "out.zarr"), wanted).status == "failed"
    page = page_of(tmp_path / "out.zarr")
    assert page.overview.status == "failed"
    failed = [f.name for f in page.survey.volumes if f.failures]
    assert failed == [f"A/2/0 t={t} {channel}" for t in (0, 1) for channel in ("dna", "actin")]
    text = render(page.plans)
    found = Parsed(text)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert "B/2/1" in found.text
    assert "is corrupt" in found.text
    for chart in (
        "Objects dna",
        "Failed dna",
        "Foreground actin",
        "Mean score over time",
        "Scores of voxels",
    ):
        assert chart in found.text
    assert "--channel dna,actin" in page.origin.commands[0]
    # A cell of the map for each field and metric and channel, and for what is not there.
    assert len(page.plate_maps) == 8
    assert text.count('href="#m0"') == 8


def test_a_name_from_a_plate_is_text_not_markup(options, tmp_path):
    source = write_image(
        tmp_path / "image.zarr", blobs((1, 16, 40, 44)), axes="czyx", channels=["<b onclick=x>"]
    )
    hostile = tmp_path / "<img src=x onerror=alert(1)>.zarr"
    source = source.rename(hostile)
    group = zarr.open_group(source, mode="r+")
    ome = dict(group.attrs["ome"])
    ome["multiscales"][0]["name"] = "<script>alert(1)</script>"
    group.attrs["ome"] = ome
    assert (
        segment_here(str(source), str(tmp_path / "out.zarr"), parse_settings(options)).status
        == "done"
    )
    text = Path(write_report(str(tmp_path / "out.zarr")).url).read_text()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "<b onclick" not in text
    assert "&lt;img src=x" in text
    assert "#seams" not in text


def test_the_source_may_be_gone(split, tmp_path):
    plan = find_plans(str(split[1]))[0].model_copy(
        update={"source": Location.of(tmp_path / "gone.zarr")}
    )
    text = render([plan])
    assert text.count("cannot be read") == 1


def test_what_is_read_is_bounded(split):
    (plan,) = find_plans(str(split[1]))
    for budget in (10, 1000, 10**6):
        window = whole_or_middle(plan, budget)
        assert window in Box.of(plan.volume_shape)
    assert choose_view(plan, Box.of(plan.volume_shape), 10**6).level == 0
    assert spread(3, 5) == [0, 1, 2]
    assert spread(10**6, 3) == [0, round(999_999 / 2), 999_999]


def test_wrong_requests(split, tmp_path, options):
    source, target = split
    run = CliRunner().invoke
    nothing = run(build_app(), ["report", str(source)])
    assert nothing.exit_code == 2
    assert "no run is recorded" in nothing.output
    assert not Path(f"{source}.report.html").exists()
    out = tmp_path / "here.html"
    done = run(build_app(), ["report", str(target), "--out", str(out), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.output.splitlines()[-1])["report"] == str(out)
    assert out.exists()
    other = run(build_app(), ["report", str(target), "--label-name", "other"])
    assert other.exit_code == 2


def test_objects_are_outlined_on_the_image():
    """A pixel has the color of an object exactly beside the end of that object."""
    labels = np.zeros((20, 30), np.uint32)
    labels[5:15, 5:15] = 1
    labels[5:15, 15:25] = 2
    picture = np.zeros((20, 30, 3), np.uint8)
    pictures._outline(picture, labels)
    expected = find_boundaries(labels, connectivity=1, mode="inner")
    assert_array_equal(picture.any(axis=2), expected)
    assert_array_equal(picture[5, 5], pictures.label_colors(np.array(1)))
    assert_array_equal(picture[5, 24], pictures.label_colors(np.array(2)))


@pytest.mark.parametrize(
    ("width_um", "length"), [(66.6, 10), (200, 50), (16.7, 5), (4e5, 100_000), (0.9, 0.2), (0, 0)]
)
def test_the_scale_bar_is_a_round_length_that_fits(width_um, length):
    assert pictures._bar_length(width_um) == pytest.approx(length)


def test_a_command_breaks_between_options_only():
    command = "megaseg segment in.zarr out.zarr --channel 'a b' --overwrite --min-size 5"
    parts = _unbroken(command)
    assert " ".join(parts) == command
    assert parts[-2:] == ["--overwrite", "--min-size 5"]


def test_numbers_in_wells_are_means_where_they_fit():
    cells = {"A/1": [Cell(2.0, "", "#x"), Cell(4.0, "", "#x")], "A/2": [Cell(None, "", "#x", True)]}
    drawn = plate_map(["A"], ["1", "2"], cells, title="Objects", text=number)
    assert ">3</text>" in drawn
    wide = plate_map(["A"], list("123456789"), cells, title="Objects", text="{:.9f}".format)
    assert "3.000000000" not in wide

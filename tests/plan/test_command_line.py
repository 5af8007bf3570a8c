"""Shell commands for the user: what is typed is what is parsed, and no secret is written."""

import shlex
from itertools import pairwise

from megaseg_dask.plan.command_line import command_line
from megaseg_dask.plan.settings import Settings, parse_settings


def test_a_command_has_what_differs_from_the_defaults():
    given = {
        "model": ["a,b.ckpt", "c.ckpt"],
        "roi": "0:10,5:20,0:30",
        "time": "2:",
        "outputs": "labels,scores",
        "overlap": 0,
        "tta": True,
        "block": "16,32,64",
    }
    settings = parse_settings(given)
    command = command_line("segment", "in it", "out", settings=settings, options=given)
    words = shlex.split(command)
    assert words[:4] == ["megaseg", "segment", "in it", "out"]
    assert words.count("--model") == 2
    assert "--tta" in words
    options = dict(pairwise(words))
    assert options["--roi"] == "0:10,5:20,0:30"
    assert options["--time"] == "2:"
    assert options["--block"] == "16,32,64"
    assert command_line("view", "out", settings=Settings(), options=given) == "megaseg view out"


def test_a_command_has_no_secret():
    settings = parse_settings({"storage_option": "region=here,secret_access_key=hidden"})
    command = command_line("status", "out", settings=settings, options=["storage_option"])
    assert command == "megaseg status out --storage-option region=here"
    only_secret = parse_settings({"storage_option": "secret_access_key=hidden"})
    command = command_line("status", "out", settings=only_secret, options=["storage_option"])
    assert command == "megaseg status out"


def test_relabel_takes_the_options_that_its_plan_reads():
    """The command line keeps its own list, as `--help` imports no plan."""
    from megaseg_dask.cli.app import _COMMANDS, relabel
    from megaseg_dask.plan.relabelling import RESULT, WORK

    assert sorted(_COMMANDS[relabel]) == sorted([*RESULT, *WORK])

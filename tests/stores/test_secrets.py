"""Credentials given as options reach the workers, and nothing else.

No run folder, no output, no report, no log.
"""

import json

from megaseg_dask.stores import Location, StoreOptions, configure
from tests.cli.test_cli import megaseg
from tests.fixtures.images import blobs, write_image
from tests.fixtures.servers import KEY, SECRET
from tests.stores.test_runs import upload


def test_a_secret_of_the_command_line_is_written_nowhere(
    s3, folder, tiny_bundle, tmp_path, monkeypatch
):
    source = upload(
        write_image(tmp_path / "image.zarr", blobs((20, 40, 60))), f"{folder}/image.zarr"
    )
    target = f"{folder}/out.zarr"
    # The environment has none, so the options alone lead to the data, in the client and in its
    # workers.
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    options = ["--storage-option", f"access_key_id={KEY},secret_access_key={SECRET}"]
    run = [
        "--model",
        tiny_bundle,
        "--threads",
        "1",
        "--overlap",
        "0",
        "--engine",
        "torch",
        "--patch",
        "16,32,32",
        "--workers",
        "2",
        "--json",
        *options,
    ]
    ended = megaseg("segment", source, target, *run)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["status"] == "done"
    report = tmp_path / "report.html"
    reported = megaseg("report", target, "--out", report, *options)
    assert reported.returncode == 0, reported.stderr

    texts = {
        "stdout": ended.stdout,
        "stderr": ended.stderr,
        "report": report.read_text(),
        "said": reported.stderr,
    }
    assert [name for name, text in texts.items() if SECRET in text] == []
    configure(
        StoreOptions.parse(
            s3.url, storage_options=[options[1].split(",")[0], options[1].split(",")[1]]
        )
    )
    written = Location.of(folder)
    keys = [key for key in written.keys("") if not key.startswith("image.zarr/")]
    assert any(key.startswith("out.zarr.run/megaseg/journal/") for key in keys)
    assert [key for key in keys if SECRET.encode() in (written.get(key) or b"")] == []

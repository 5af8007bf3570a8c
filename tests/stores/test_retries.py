"""Faults of single requests, between us and a real server: they change nothing.

And faults that stay: they end as an error that names the address and the cause.
"""

import random
from collections import Counter

import pytest

from megaseg_dask.errors import MegasegError, StoreError
from megaseg_dask.events import Result
from megaseg_dask.models import load_bundle, registry
from megaseg_dask.ngff.plate import Field, Plate, write_plate
from megaseg_dask.plan.settings import parse_settings
from megaseg_dask.run.lease import Timing
from megaseg_dask.stores import Location, StoreOptions, clear_store_caches, configure
from tests.fixtures.bundles import write_zip
from tests.fixtures.images import blobs, write_image
from tests.fixtures.relay import FAULTS, Relay, relay_to
from tests.fixtures.runs import segment_here
from tests.fixtures.servers import range_server

SHAPE = (16, 48, 64)
RUNS = {
    "one block": {"block": "16,48,64"},
    "blocks": {
        "block": "16,32,32",
        "threshold": "otsu",
        "fill_holes": 9,
        "outputs": "labels,scores,mask,measurements",
    },
    "plate": {"outputs": "labels,scores,measurements"},
}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("megaseg_dask.stores.access._FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr("megaseg_dask.stores.patience._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("megaseg_dask.stores.patience._FIRST_PAUSE_IF_DENIED_S", 0.01)
    monkeypatch.setattr("megaseg_dask.run.retries._FIRST_PAUSE_S", 0.01)


@pytest.fixture
def relay(s3, monkeypatch):
    """The way to the S3 server, on which faults happen."""
    with relay_to(s3.url) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        clear_store_caches()
        yield relay


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.zarr", blobs(SHAPE), chunks=(16, 32, 32))


@pytest.fixture
def source(s3, image, folder):
    return upload(s3, image, folder)


@pytest.fixture
def plate(s3, tmp_path, folder):
    fields = [Field("A", "1", "0"), Field("B", "2", "0")]
    for seed, field in enumerate(fields):
        write_image(tmp_path / "plate.zarr" / field.path, blobs((16, 32, 32), seed))
    listing = Plate("0.5", "plate", tuple("AB"), tuple("12"), tuple(fields))
    write_plate(Location.of(tmp_path / "plate.zarr"), listing, "0.5")
    return upload(s3, tmp_path / "plate.zarr", folder)


def upload(s3, path, folder: str) -> str:
    return s3.upload(path, "private", f"{folder.removeprefix('s3://private/')}/{path.name}")


def run(source: str, target: str, bundle, name: str, **options) -> Result:
    """Segment with one repetition of a request, and of a task none."""
    wanted = {"model": str(bundle), "threads": 1, "overlap": 0, "retries": 1}
    clear_store_caches()
    return segment_here(source, target, parse_settings({**wanted, **RUNS[name], **options}))


def objects_of(target: str) -> dict[str, bytes | None]:
    """All that a run published, by key."""
    location = Location.of(target)
    return {key: location.get(key) for key in location.keys("")}


def fail_once(relay: Relay, *faults: str) -> None:
    """Let the first request for each object meet a fault; of several, by chance."""
    seen = set()
    chance = random.Random(0)

    def fault_of(_: int, method: str, path: str) -> str | None:
        if (method, path) in seen:
            return None
        seen.add((method, path))
        return chance.choice(faults)

    relay.fault_of = fault_of


def heal(relay: Relay) -> None:
    relay.fault_of = lambda *_: None


def test_each_request_of_a_run_fails_once(relay, source, folder, tiny_bundle):
    """Source, target, journal, lease and intermediate data: the run ends with the same bytes."""
    assert run(source, f"{folder}/calm.zarr", tiny_bundle, "blocks").status == "done"
    fail_once(relay, *FAULTS)
    found = run(source, f"{folder}/out.zarr", tiny_bundle, "blocks")
    heal(relay)
    assert found.status == "done", found.failures
    assert objects_of(f"{folder}/out.zarr") == objects_of(f"{folder}/calm.zarr")


def test_each_request_to_a_web_server_fails_once(image, tmp_path, tiny_bundle):
    calm = run(str(image), str(tmp_path / "calm.zarr"), tiny_bundle, "one block")
    with range_server(tmp_path) as upstream, relay_to(upstream) as relay:
        fail_once(relay, *FAULTS)
        source = f"{relay.url}/image.zarr"
        found = run(source, str(tmp_path / "out.zarr"), tiny_bundle, "one block")
    assert (found.status, calm.status) == ("done", "done"), found.failures
    assert objects_of(str(tmp_path / "out.zarr")) == objects_of(str(tmp_path / "calm.zarr"))


def test_each_request_for_a_model_fails_once(relay, s3, tmp_path, monkeypatch):
    path = write_zip(tmp_path / "megaSeg.zip")
    s3.client().put_object(Bucket="public", Key="megaSeg.zip", Body=path.read_bytes())
    monkeypatch.setenv("MEGASEG_BUCKET", "public")
    monkeypatch.setenv("MEGASEG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MEGASEG_OFFLINE")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fail_once(relay, *FAULTS)
    assert registry.fetch("MegaSeg_v1").digest == load_bundle(path).digest
    assert len(relay.requests) > 2


@pytest.mark.parametrize("fault", ["lost answer", "reset", "truncated"])
def test_a_conditional_put_that_is_made_again_finds_its_own_first_write(relay, folder, fault):
    location = Location.of(folder)
    fail_once(relay, fault)
    assert location.create("mine", b"mine")
    assert location.get("mine") == b"mine"
    # Of another one it is refused, made again or not.
    fail_once(relay, fault)
    assert not location.create("mine", b"another")
    assert not location.create("mine", b"another")
    assert location.get("mine") == b"mine"


@pytest.mark.parametrize(
    ("fault", "cause", "n_requests"),
    [("denied", "access denied", 4), ("timeout", "too slowly", 4), (None, "", 1)],
)
def test_a_fault_that_stays_is_named_after_a_few_attempts(relay, folder, fault, cause, n_requests):
    relay.fault_of = lambda *_: fault
    location = Location.of(folder)
    if fault:
        with pytest.raises(StoreError, match=rf"^cannot read {folder}/a: .*{cause}"):
            location.get("a")
    else:
        assert location.get("a") is None
    assert len(relay.requests) == n_requests


def test_a_wrong_key_is_told_at_once(relay, folder, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    clear_store_caches()
    with pytest.raises(StoreError, match="the secret does not match"):
        Location.of(folder).get("a")
    assert len(relay.requests) == 1


def test_retries_are_those_of_the_options(relay, folder):
    configure(StoreOptions(retries=0))
    relay.fault_of = lambda *_: "timeout"
    with pytest.raises(StoreError):
        Location.of(folder).get("a")
    assert len(relay.requests) == 1


# -- campaigns

SEED = 16
N_SINGLE = 40
N_LASTING = 20


@pytest.fixture
def sources(source, plate):
    return {"one block": source, "blocks": source, "plate": plate}


def trials(relay, sources, folder, bundle, n: int):
    """Yield ``n`` trials by chance: a run, a fault and the number of a request.

    With what an undisturbed run published.
    """
    chance = random.Random(SEED)
    calm, n_requests = {}, {}
    for name, source in sources.items():
        relay.requests.clear()
        assert run(source, f"{folder}/calm-{name}.zarr", bundle, name).status == "done"
        n_requests[name] = len(relay.requests)
        calm[name] = objects_of(f"{folder}/calm-{name}.zarr")
    for number in range(n):
        # Each pair in turn, at a request by chance.
        name = list(RUNS)[number % len(RUNS)]
        fault = FAULTS[number // len(RUNS) % len(FAULTS)]
        relay.requests.clear()
        yield name, fault, chance.randrange(n_requests[name]), calm[name]


@pytest.mark.slow
def test_a_single_fault_of_any_request_changes_nothing(relay, sources, folder, tiny_bundle):
    counts = Counter()
    for name, fault, chosen, calm in trials(relay, sources, folder, tiny_bundle, N_SINGLE):
        relay.fault_of = lambda number, *_, at=chosen, kind=fault: kind if number == at else None
        target = f"{folder}/{fault}-{name}-{chosen}.zarr"
        found = run(sources[name], target, tiny_bundle, name)
        heal(relay)
        # A heart beats more or less often.
        asked = relay.requests[chosen : chosen + 1]
        assert found.status == "done", (name, fault, asked, found.failures)
        assert objects_of(target) == calm, (name, fault, asked)
        counts[fault] += len(asked)
    assert counts.keys() == set(FAULTS)


@pytest.mark.slow
# zarr leaves the other requests of an array unmade when one has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_fault_that_stays_is_told_by_address_and_cause(
    relay, sources, folder, tiny_bundle, monkeypatch
):
    """From some request on all fail: an error of ours, or failures; then the same command ends."""
    # A lease that could not be given back is watched for a while.
    monkeypatch.setattr("megaseg_dask.run.runner.LEASE_TIMING", Timing(beat_s=0.2))
    counts = Counter()
    hasty = {"storage_option": "max_retries=1"}
    for name, fault, chosen, calm in trials(relay, sources, folder, tiny_bundle, N_LASTING):
        relay.fault_of = lambda number, *_, at=chosen, kind=fault: kind if number >= at else None
        target = f"{folder}/{fault}-{name}-{chosen}.zarr"
        try:
            result = run(sources[name], target, tiny_bundle, name, **hasty)
            told = [failure.error for failure in result.failures]
            assert result.status != "done" or chosen > len(relay.requests) - 5
        except MegasegError as error:
            told = [str(error)]
        heal(relay)
        for message in told:
            assert "s3://private" in message, (name, fault, chosen, message)
            assert "\n" not in message, (name, fault, chosen, message)
        again = run(sources[name], target, tiny_bundle, name)
        assert again.status == "done", (name, fault, chosen, again.failures)
        assert objects_of(target) == calm, (name, fault, chosen)
        counts[fault] += 1
    assert counts.keys() == set(FAULTS)

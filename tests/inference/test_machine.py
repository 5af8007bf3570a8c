"""What a container or a job may use: control groups of both versions, nested, and other limits."""

import os
import resource
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaseg_dask.inference.machine import count_killed, memory_bytes, n_cores, processor

GB = 10**9
MACHINE_BYTES = psutil.virtual_memory().total
V2 = "31 23 0:28 {below} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "35 31 0:32 {below} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "36 31 0:33 {below} /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
)
GROUPS = {2: "0::{path}\n", 1: "9:name=systemd:/\n4:memory:{path}\n1:cpu,cpuacct:{path}\n"}


def make_tree(root: Path, version: int, path: str, files: dict[str, str], below: str = "/") -> Path:
    """Write ``/proc`` and ``/sys`` of a process in a group, whose ``files`` are below its mount."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    files["proc/self/cgroup"] = GROUPS[version].format(path=path)
    files["proc/self/mountinfo"] = {1: V1, 2: V2}[version].format(below=below)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@given(limits=st.lists(st.none() | st.integers(10**6, MACHINE_BYTES), min_size=1, max_size=4))
@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_a_group_and_all_above_it_counts(version, limits, tmp_path_factory):
    names = ["", *(f"g{depth}" for depth in range(1, len(limits)))]
    files = {}
    for depth, limit in enumerate(limits):
        group = "/".join(filter(None, names[: depth + 1]))
        if version == 2:
            files[f"{group}/memory.max"] = "max" if limit is None else f"{limit}\n"
        else:
            # Without a limit version 1 has a large number.
            files[f"memory/{group}/memory.limit_in_bytes"] = f"{limit or 2**63 - 4096}\n"
    path = "/" + "/".join(names[1:])
    root = make_tree(tmp_path_factory.mktemp("root"), version, path, files)
    assert memory_bytes(root) == min([MACHINE_BYTES, *(n for n in limits if n is not None)])


@pytest.mark.parametrize("version", [1, 2])
def test_the_group_of_a_container_is_found_where_it_is_mounted(tmp_path, version):
    name = "memory.max" if version == 2 else "memory/memory.limit_in_bytes"
    files = {name: f"{2 * GB}\n"}
    # The path of the host, and the mount begins there; or a path of which nothing is mounted.
    for number, (path, below) in enumerate([("/docker/a", "/docker/a"), ("/docker/a", "/other")]):
        root = make_tree(tmp_path / str(number), version, path, files, below)
        assert memory_bytes(root) == 2 * GB


def test_the_instructions_that_kernels_may_use_belong_to_the_processor(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    plain = processor()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert processor() == f"{plain} AVX2"


def test_a_soft_limit_counts_too(tmp_path):
    files = {"a/memory.max": "max", "a/memory.high": f"{GB}"}
    assert memory_bytes(make_tree(tmp_path, 2, "/a", files)) == GB


@pytest.mark.parametrize(
    ("version", "files", "expected"),
    [
        (2, {"a/cpu.max": "100000 100000"}, 1),
        (2, {"a/cpu.max": "50000 100000"}, 1),
        (2, {"a/cpu.max": "max 100000"}, None),
        (2, {"a/cpu.max": "max 100000", "cpu.max": "10000 100000"}, 1),
        (1, {"cpu/a/cpu.cfs_quota_us": "90000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
        (1, {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_quota_of_processors_counts(tmp_path, version, files, expected):
    root = make_tree(tmp_path, version, "/a", files)
    assert n_cores(root) == (expected or len(os.sched_getaffinity(0)))


def test_without_any_of_these_files_the_machine_counts(tmp_path):
    assert (memory_bytes(tmp_path), count_killed(tmp_path)) == (MACHINE_BYTES, 0)


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (2, {"a/memory.events": "low 0\nhigh 7\nmax 3\noom 2\noom_kill 2\n"}),
        (1, {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"}),
    ],
)
def test_killed_processes_are_counted(tmp_path, version, files):
    assert count_killed(make_tree(tmp_path, version, "/a", files)) == 2


def in_a_process(code: str, before=None) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=before)
    return done.stdout.strip()


PRINT = "from megaseg_dask.inference.machine import memory_bytes; print(memory_bytes())"


def test_a_limit_of_the_process_counts():
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 * GB, 3 * GB))

    assert in_a_process(PRINT, limit) == str(3 * GB)


@pytest.fixture
def group():
    """A real control group of memory with 1 GB, where this user may make one."""
    for top, name in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        folder = Path("/sys/fs/cgroup") / top / f"megaseg-test-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            if (folder / name).exists():
                (folder / name).write_text(str(2**30))
                yield folder
                folder.rmdir()
                return
            folder.rmdir()
    pytest.skip("no control group can be made here")


def test_a_real_control_group_counts(group):
    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    assert in_a_process(PRINT, enter) == str(2**30)

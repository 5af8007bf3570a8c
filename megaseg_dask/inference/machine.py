"""What this process may use: of the machine, or of the container or job that it runs in.

A control group limits all processes in it, also those of the groups below it. So the least of a
group and of all above it counts.
"""

import math
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

_ROOT = Path("/")
# Of groups of version 2, and of version 1.
_MEMORY_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
# Both names of oneDNN's variable.
_INSTRUCTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_KILLS = ("memory.events", "memory.oom_control")


def n_cores(root: Path = _ROOT) -> int:
    """Return the cores that this process may use, which a batch system may have restricted.

    ``root`` is where ``/proc`` and ``/sys`` are.
    """
    n = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        n = len(os.sched_getaffinity(0))
    shares = [share for group in _groups("cpu", root) for share in _cpu_shares(group)]
    return max(min([n, *map(math.ceil, shares)]), 1)


def memory_bytes(root: Path = _ROOT) -> int:
    """Return the bytes that all processes here may use together; one of them may have less."""
    limits = [psutil.virtual_memory().total]
    for group in _groups("memory", root):
        for name in _MEMORY_LIMITS:
            limits += filter(None, map(_number, _read(group / name)[:1]))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        limits.append(limit)
    return min(limits)


def processor(root: Path = _ROOT) -> str:
    """Return the model of this machine's processor, as far as the system tells it.

    With it are the instructions that oneDNN may use, if somebody restricts them: other kernels have
    another speed, and other last bits.
    """
    model = f"{platform.processor()} {platform.machine()}"
    for line in _lines(root / "proc/cpuinfo"):
        if line.startswith("model name"):
            model = line
            break
    return " ".join([model, *filter(None, map(os.environ.get, _INSTRUCTIONS))])


def count_killed(root: Path = _ROOT) -> int:
    """Return how many processes the system has killed here for lack of memory."""
    counts = [0]
    files = [group / name for group in _groups("memory", root) for name in _KILLS]
    for file in [*files, root / "proc/vmstat"]:
        # A line is a name and a number.
        words = _read(file)
        if "oom_kill" in words[:-1]:
            counts.append(_number(words[words.index("oom_kill") + 1]) or 0)
    return max(counts)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folder of this process's group of a controller, and those of all groups above."""
    paths = _group_paths(controller, root)
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, of_type = line.partition(" - ")
        kind, _, options = of_type.split(" ", 2)
        version = {"cgroup2": "", "cgroup": controller}.get(kind)
        is_there = version == "" or controller in options.rpartition(" ")[2].split(",")
        if version is None or version not in paths or not is_there:
            continue
        below, mount = fields.split(" ")[3:5]
        top = root / mount.lstrip("/")
        # In a container the group's path may be that on the host, or begin where the mount does.
        inner = os.path.relpath(paths[version], below)
        folder = top if inner.startswith("..") else top / inner
        while folder.is_relative_to(top):
            yield folder
            folder = folder.parent


def _group_paths(controller: str, root: Path) -> dict[str, str]:
    """Return the path of this process's group: of version 2 under "", else by controller."""
    paths = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            paths[controller] = path
        elif not controllers:
            paths[""] = path
    return paths


def _cpu_shares(group: Path) -> Iterator[float]:
    """Yield the cores that the quota of a group allows, of either version."""
    quota_files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    for words in (_read(group / "cpu.max"), [w for f in quota_files for w in _read(group / f)]):
        quota, period = [*map(_number, words), None, None][:2]
        if quota and period:
            yield quota / period


def _number(word: str) -> int | None:
    """Return a number that limits something; others are "max" or -1."""
    return int(word) if word.isdecimal() else None


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text().splitlines()
    return []


def _read(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()

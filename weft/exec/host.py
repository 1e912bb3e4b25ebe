"""What this machine, or the container we are in, will really give us: memory, cores, and our own use of them.

A host's totals mislead inside a container, so every limit is read from where it is set: control groups (version 2 and
version 1, each up to the root that we can see), resource limits, CPU affinity, and only then the host.

    available_memory()  ->  MemoryLimit(bytes=25_178_669_056, source="MemAvailable")
    cpu_count()         ->  CpuLimit(cores=2.0, source="affinity")

Units: bytes and cores.  `proc` and `cgroup` are the roots of the two file systems, so tests hand in folders of their own.
Sources: Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, proc(5), sched_getaffinity(2).
"""

from __future__ import annotations

import gc
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.config import MOST_BYTES
from weft.config import format_size as format_size
from weft.config import parse_size as parse_size
from weft.errors import ConfigError

resource: Any
try:
    import resource
except ImportError:  # Windows has no resource limits of this kind
    resource = None

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED_BYTES = MOST_BYTES
"""Version 1 writes "no limit" as a number near 2**63; nothing above this is a limit."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Bytes that we may still take, and which limit that is."""

    bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class CpuLimit:
    """Cores that we may keep busy (a quota may be a fraction), and which limit that is."""

    cores: float
    source: str

    @property
    def threads(self) -> int:
        """Whole threads that make sense: at least 1, a quota of 1.5 cores gives 1."""
        return max(1, int(self.cores))


# ---------------------------------------------------------------------------------------------- memory


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> MemoryLimit:
    """The least of: memory free on the host, room in each control group above us, room under RLIMIT_AS.

    Page cache that the kernel would give back counts as room.  Raises ConfigError where nothing can be read.
    """
    limits = [*_host_memory(proc), *_cgroup_memory(proc, cgroup), *_address_space(proc)]
    if not limits:
        raise ConfigError(
            "cannot find out how much memory this machine has; give the size with --memory, e.g. --memory 4G"
        )
    return min(limits, key=lambda limit: limit.bytes)


def _host_memory(proc: Path) -> Iterator[MemoryLimit]:
    text = _read(proc / "meminfo")
    fields = {line.partition(":")[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 1}
    if "MemAvailable" in fields:
        yield MemoryLimit(int(fields["MemAvailable"]) * 1024, "MemAvailable")
    elif proc == PROC and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
        yield MemoryLimit(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "physical memory")


def _cgroup_memory(proc: Path, cgroup: Path) -> Iterator[MemoryLimit]:
    for folder in _groups(proc, cgroup, controller=""):
        limit = _number(folder / "memory.max")
        if limit is not None:
            used = _number(folder / "memory.current") or 0
            yield MemoryLimit(_room(limit, used, _reclaimable(folder, "file")), f"cgroup v2 {_name(folder, cgroup)}")
    for folder in _groups(proc, cgroup, controller="memory"):
        limit = _number(folder / "memory.limit_in_bytes")
        if limit is not None:
            used = _number(folder / "memory.usage_in_bytes") or 0
            cache = _reclaimable(folder, "total_file")
            yield MemoryLimit(_room(limit, used, cache), f"cgroup v1 {_name(folder, cgroup)}")


def _room(limit: int, used: int, cache: int) -> int:
    """Bytes left of a limit; never negative, never more than the limit itself."""
    return min(limit, max(0, limit - max(0, used - cache)))


def _reclaimable(folder: Path, kind: str) -> int:
    """Page cache of a group that can be dropped: file pages on the active and inactive lists (shared memory is not there)."""
    fields = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if len(line.split()) >= 2)
    names = {"file": ("active_file", "inactive_file"), "total_file": ("total_active_file", "total_inactive_file")}[kind]
    return sum(int(fields.get(name, "0")) for name in names)


def _address_space(proc: Path) -> Iterator[MemoryLimit]:
    if resource is None:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY or soft >= UNLIMITED_BYTES:
        return
    pages = _read(proc / "self" / "statm").split()
    used = int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0
    yield MemoryLimit(max(0, soft - used), "RLIMIT_AS")


# ---------------------------------------------------------------------------------------------- cores


def cpu_count(proc: Path = PROC, cgroup: Path = CGROUP) -> CpuLimit:
    """The least of: the host's cores, our CPU affinity, the CPU quota of each control group above us."""
    limits = [CpuLimit(float(os.cpu_count() or 1), "host")]
    if hasattr(os, "sched_getaffinity"):
        limits.append(CpuLimit(float(len(os.sched_getaffinity(0))), "affinity"))
    for folder in _groups(proc, cgroup, controller=""):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.strip().isdigit() and int(period) > 0:
            limits.append(CpuLimit(int(quota) / int(period), f"cgroup v2 {_name(folder, cgroup)}"))
    for folder in _groups(proc, cgroup, controller="cpu"):
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_us is not None and quota_us > 0 and period_us:
            limits.append(CpuLimit(quota_us / period_us, f"cgroup v1 {_name(folder, cgroup)}"))
    return min(limits, key=lambda limit: limit.cores)


def processor(proc: Path = PROC) -> str:
    """What it calls itself; else its kind, such as x86_64."""
    names = (
        line.partition(":")[2].strip() for line in _read(proc / "cpuinfo").splitlines() if line[:10] == "model name"
    )
    return next(names, "") or platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------- our own use


def rss_bytes(proc: Path = PROC) -> int:
    """Memory of this process that is resident now."""
    pages = _read(proc / "self" / "statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else peak_rss_bytes(proc)


def peak_rss_bytes(proc: Path = PROC) -> int:
    """The most that was ever resident.  0 where the system does not say."""
    for line in _read(proc / "self" / "status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # macOS counts bytes, Linux kilobytes


# ---------------------------------------------------------------------------------------------- sizes as people write them


# ---------------------------------------------------------------------------------------------- control groups


def _groups(proc: Path, cgroup: Path, controller: str) -> Iterator[Path]:
    """Folders of our control group and of its parents, innermost first; controller "" is version 2's one tree.

    In a container the path that the kernel names may lie outside of what is mounted; then the mount's own root is ours.
    """
    for line in _read(proc / "self" / "cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3 or controller not in parts[1].split(","):
            continue
        for root in _roots(cgroup, parts[1], controller):
            if not root.is_dir():
                continue
            inner = [p for p in parts[2].split("/") if p]
            if ".." in inner:  # the group lies above our namespace's root
                inner = []
            for depth in range(len(inner), -1, -1):
                folder = root.joinpath(*inner[:depth])
                if folder.is_dir():
                    yield folder
            break


def _roots(cgroup: Path, controllers: str, controller: str) -> tuple[Path, ...]:
    if controller:
        return (cgroup / controller, cgroup / controllers)
    # beside version 1 the unified tree is mounted at "unified"; on its own it is the mount itself
    return (cgroup / "unified", cgroup)


def settle() -> None:
    """Once a process is ready: Python never again looks through what is there by now for cycles that nobody needs.

    In an engine, with PyTorch, that takes 70 to 230 ms in the middle of some step, in what serves HTTP 40 to 70.
    """
    gc.collect()
    gc.freeze()


def _name(folder: Path, cgroup: Path) -> str:
    return "/" + "/".join(folder.relative_to(cgroup).parts)


def _number(path: Path) -> int | None:
    """The whole number in a file; None where it is absent, "max", or so large that it means no limit."""
    text = _read(path).strip()
    try:
        value = int(text)
    except ValueError:
        return None
    return value if value < UNLIMITED_BYTES else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

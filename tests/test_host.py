"""Limits of the machine, read from folders made here and, once, from the real machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.errors import ConfigError
from weft.exec.host import available_memory, cpu_count, format_size, parse_size, peak_rss_bytes, rss_bytes

MIB = 1 << 20
GIB = 1 << 30


class Machine:
    """A made /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, *, free_bytes: int = 64 * GIB, groups: str = "0::/a/b\n") -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        self.write(self.proc / "meminfo", f"MemTotal: 1 kB\nMemAvailable: {free_bytes // 1024} kB\n")
        self.write(self.proc / "self" / "cgroup", groups)
        self.cgroup.mkdir(parents=True)

    @staticmethod
    def write(path: Path, text: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))

    def group(self, folder: str, **files: object) -> None:
        for name, text in files.items():
            self.write(self.cgroup / folder / name.replace("__", "."), text)

    def memory(self) -> tuple[int, str]:
        limit = available_memory(self.proc, self.cgroup)
        return limit.bytes, limit.source

    def cores(self) -> tuple[float, str]:
        limit = cpu_count(self.proc, self.cgroup)
        return limit.cores, limit.source


def test_memory_of_a_plain_host(tmp_path: Path) -> None:
    assert Machine(tmp_path, free_bytes=3 * GIB).memory() == (3 * GIB, "MemAvailable")


def test_memory_v2_is_limit_minus_what_cannot_be_dropped(tmp_path: Path) -> None:
    m = Machine(tmp_path)
    stat = f"anon {1 * GIB}\nfile {2 * GIB}\nactive_file {GIB // 2}\ninactive_file {GIB}\nshmem {GIB // 2}\n"
    m.group("a/b", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=stat)
    assert m.memory() == (4 * GIB - (3 * GIB - GIB - GIB // 2), "cgroup v2 /a/b")


def test_memory_v2_parent_is_tighter(tmp_path: Path) -> None:
    m = Machine(tmp_path)
    m.group("a/b", memory__max="max", memory__current=5 * GIB)
    m.group("a", memory__max=2 * GIB, memory__current=2 * GIB - 100 * MIB)
    assert m.memory() == (100 * MIB, "cgroup v2 /a")


def test_memory_v2_over_its_limit_is_no_room(tmp_path: Path) -> None:
    m = Machine(tmp_path)
    m.group("a/b", memory__max=GIB, memory__current=2 * GIB)
    assert m.memory() == (0, "cgroup v2 /a/b")


def test_memory_v2_namespaced_root(tmp_path: Path) -> None:
    """In a container the kernel says "/" and the mount's root is the container's own group."""
    m = Machine(tmp_path, groups="0::/\n")
    m.group(".", memory__max=GIB, memory__current=GIB // 4)
    assert m.memory() == (GIB - GIB // 4, "cgroup v2 /")


def test_memory_v1_in_a_container_without_its_path(tmp_path: Path) -> None:
    m = Machine(tmp_path, groups="5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n")
    m.group(
        "memory",
        memory__limit_in_bytes=GIB,
        memory__usage_in_bytes=GIB // 2,
        memory__stat=f"active_file 1\ntotal_active_file {MIB}\ntotal_inactive_file {2 * MIB}\n",
    )
    assert m.memory() == (GIB // 2 + 3 * MIB, "cgroup v1 /memory")


def test_memory_v1_no_limit_is_a_huge_number(tmp_path: Path) -> None:
    m = Machine(tmp_path, free_bytes=GIB, groups="5:memory:/a\n")
    m.group("memory/a", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=0)
    assert m.memory() == (GIB, "MemAvailable")


def test_memory_host_is_tighter_than_the_group(tmp_path: Path) -> None:
    m = Machine(tmp_path, free_bytes=GIB)
    m.group("a/b", memory__max=8 * GIB, memory__current=0)
    assert m.memory() == (GIB, "MemAvailable")


def test_memory_unknown_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--memory"):
        available_memory(tmp_path / "none", tmp_path / "none")


def test_address_space_limit_is_seen() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from weft.exec.host import available_memory\n"
        "m = available_memory(); print(m.bytes, m.source)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size, source = done.stdout.split(maxsplit=1)
    assert source.strip() == "RLIMIT_AS"
    assert GIB < int(size) < 2 * GIB


@pytest.fixture
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(48)), raising=False)


@pytest.mark.usefixtures("many_cores")
def test_cores(tmp_path: Path) -> None:
    m = Machine(tmp_path, groups="0::/a/b\n4:cpu,cpuacct:/j\n")
    assert m.cores() == (48.0, "affinity")
    m.group("a/b", cpu__max="max 100000")
    assert m.cores() == (48.0, "affinity")
    m.group("a", cpu__max="350000 100000")
    assert m.cores() == (3.5, "cgroup v2 /a")
    m.group("cpu/j", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert m.cores() == (3.5, "cgroup v2 /a")
    m.group("cpu", cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert m.cores() == (1.5, "cgroup v1 /cpu")
    assert cpu_count(m.proc, m.cgroup).threads == 1


@pytest.mark.usefixtures("many_cores")
def test_half_a_core_is_one_thread(tmp_path: Path) -> None:
    m = Machine(tmp_path)
    m.group("a/b", cpu__max="50000 100000")
    limit = cpu_count(m.proc, m.cgroup)
    assert (limit.cores, limit.threads) == (0.5, 1)


@pytest.mark.usefixtures("many_cores")
def test_v1_controllers_mounted_together(tmp_path: Path) -> None:
    m = Machine(tmp_path, groups="4:cpu,cpuacct:/j\n")
    m.group("cpu,cpuacct/j", cpu__cfs_quota_us=200000, cpu__cfs_period_us=100000)
    assert m.cores() == (2.0, "cgroup v1 /cpu,cpuacct/j")


def test_this_machine() -> None:
    memory, cores = available_memory(), cpu_count()
    assert memory.bytes > 64 * MIB
    assert 0 < cores.cores <= (os.cpu_count() or 1)
    assert MIB < rss_bytes() <= peak_rss_bytes() + MIB


def test_rss_follows_an_allocation() -> None:
    code = (
        "from weft.exec.host import rss_bytes, peak_rss_bytes\n"
        "a = rss_bytes(); x = bytearray(64 << 20); b = rss_bytes(); del x; c = rss_bytes()\n"
        "print(b - a, a + (64 << 20) - c, peak_rss_bytes() - b)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, returned, peak_above = (int(x) for x in done.stdout.split())
    assert 63 * MIB < grown < 66 * MIB
    assert returned > 60 * MIB
    assert -MIB < peak_above < 8 * MIB


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4G", 4 * GIB),
        ("4g", 4 * GIB),
        ("4GB", 4 * GIB),
        ("4GiB", 4 * GIB),
        ("512MiB", 512 * MIB),
        ("512 M", 512 * MIB),
        (" 1.5G ", GIB + GIB // 2),
        (".5k", 512),
        ("1e9", 1_000_000_000),
        ("2e1K", 20480),
        ("2T", 2 << 40),
        ("1048576", MIB),
        ("7b", 7),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "four",
        "4X",
        "-4G",
        "4 G G",
        "1e999",
        "nan",
        "inf",
        "0",
        "0.1",
        "1.5",
        "1.5B",
        "5iB",
        "4,5G",
        "2E",
        "9e9T",
    ],
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (14 * MIB, "14.0 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (1 << 60, "1.00 EiB"),
        (-MIB, "-1.0 MiB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert format_size(size) == text

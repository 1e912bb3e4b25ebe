"""What the processor of this machine is, by the system's own words."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def cpuinfo(path: Path = CPUINFO) -> dict[str, str]:
    """Entries of the first processor, such as `model name` and `flags`; none where the system has no such file."""
    try:
        first = path.read_text(encoding="utf8").partition("\n\n")[0]
    except OSError:
        return {}
    entries = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in entries}

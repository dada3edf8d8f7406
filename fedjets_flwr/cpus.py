"""How many CPUs there are for this process."""

import os
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def cpu_count(cgroups: Path = CGROUPS) -> int:
    """Return the CPUs that this process may use: by its affinity, and by the quota of its container if it has one.

    Args:
        cgroups: where Linux tells of the container; version 2 and version 1 tell in files of their own.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such file, or "max", or of another form
            quota, period = (int(word) for name in files for word in (cgroups / name).read_text().split())
            if quota > 0 and period > 0:  # -1: none
                found = min(found, max(1, quota // period))
    return found

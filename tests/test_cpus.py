"""CPUs of a process: its affinity and its container's quota."""

from pathlib import Path

import pytest

from fedjets_flwr.cpus import cpu_count


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 8), ({"cpu.max": "max 100000"}, 8), ({"cpu.max": "200000 100000"}, 2), ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1), ({"cpu.max": "6400000 100000"}, 8), ({"cpu.max": ""}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_a_containers_quota_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], count: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cpu_count(tmp_path) == count

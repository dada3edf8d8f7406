"""What a benchmark says: bounds that hold or are missed, the samples behind them, and the machine they are of."""

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedjets_flwr.cpus import cpu_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Plan:
    """How thoroughly to measure.

    Attributes:
        rounds: measured rounds, each with every side in it.
        quick: tiny sizes, which show that a benchmark works; its figures mean nothing and bounds are not judged.
        scratch: a folder for what the benchmark writes, deleted afterwards.
        cache: a folder that outlives the run (a rival's virtual environment).
    """

    rounds: int
    quick: bool
    scratch: Path
    cache: Path


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one quantity."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return min(self.values), max(self.values)

    def __str__(self) -> str:
        low, high = self.spread
        return f"{self.median:.3g} ({low:.3g} to {high:.3g})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Samples:
    """Return the ratios of measurements that were taken side by side."""
    return Samples(tuple(a / b for a, b in zip(ours, theirs, strict=True)))


@dataclass(frozen=True)
class Bound:
    """A quantity that must not exceed a limit; the median counts."""

    name: str
    samples: Samples
    limit: float
    unit: str = ""

    @property
    def holds(self) -> bool:
        """Whether the median is within the limit."""
        return self.samples.median <= self.limit

    def line(self) -> str:
        """Return one line that ends in ``ok`` or ``MISS``."""
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name}: {self.samples}{unit} <= {self.limit:g}{unit} {'ok' if self.holds else 'MISS'}"


@dataclass
class Outcome:
    """The result of one benchmark."""

    name: str
    about: str
    bounds: list[Bound] = field(default_factory=list)
    samples: dict[str, Samples] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return what goes to disk."""
        return {
            "name": self.name,
            "about": self.about,
            "bounds": [
                {"name": b.name, "median": b.samples.median, "limit": b.limit, "unit": b.unit, "holds": b.holds}
                | {"values": b.samples.values}
                for b in self.bounds
            ],
            "samples": {name: {"median": s.median, "values": s.values} for name, s in self.samples.items()},
            "facts": self.facts,
        }

    def as_markdown(self) -> str:
        """Return a table of the bounds and one of the rest."""
        lines = [f"## {self.name}", "", self.about, ""]
        if self.bounds:
            lines += ["| bound | median | range | limit | |", "|---|---:|---:|---:|---|"]
            for b in self.bounds:
                low, high = b.samples.spread
                unit = f" {b.unit}" if b.unit else ""
                verdict = "ok" if b.holds else "**MISS**"
                lines.append(
                    f"| {b.name} | {b.samples.median:.3g}{unit} | {low:.3g} to {high:.3g} | {b.limit:g} | {verdict} |"
                )
            lines.append("")
        lines += ["| measured | median | range |", "|---|---:|---:|"]
        for name, s in self.samples.items():
            lines.append(f"| {name} | {s.median:.4g} | {s.spread[0]:.4g} to {s.spread[1]:.4g} |")
        lines += [f"| {name} | {value} | |" for name, value in self.facts.items()]
        return "\n".join(lines) + "\n"

    def picture(self) -> "Figure | None":
        """Return what is drawn of it, which lies beside the JSON under the same name."""
        return None


cores = cpu_count


def machine() -> dict[str, Any]:
    """Return what figures depend on."""
    names = ("torch", "flwr", "ray", "numpy")
    model = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def matmul_peak(size: int = 2048, seconds: float = 0.5) -> float:
    """Return the float32 matrix-product rate of all cores, in FLOP/s."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cores())
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begun = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begun)
    torch.set_num_threads(threads)
    return 2 * size**3 / best


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

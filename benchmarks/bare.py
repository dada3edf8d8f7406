"""The loop without a server: all jobs of a round in one process with all cores."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from benchmarks.outcome import cores

Worker = TypeVar("Worker")
Job = TypeVar("Job")


class BareLoop(Generic[Worker, Job]):
    """Trains jobs by a pool of threads with one torch thread each, or one by one with all cores in each operation.

    Attributes:
        mode: which of the two, in words.
    """

    def __init__(
        self, make: Callable[[], Worker], train: Callable[[Worker, Job], None], cost: Callable[[Job], float]
    ) -> None:
        self._workers = [make() for _ in range(cores())]
        self._train, self._cost, self._pooled = train, cost, True

    @property
    def mode(self) -> str:
        """How the cores are used."""
        return f"{cores()} threads of one core each" if self._pooled else f"one loop, {cores()} torch threads"

    def choose(self, jobs: Sequence[Job], tries: int = 3) -> None:
        """Take the faster way."""
        seconds = {}
        for self._pooled in (True, False):
            self.round(jobs)
            seconds[self._pooled] = min(self.round(jobs) for _ in range(tries))
        self._pooled = seconds[True] < seconds[False]

    def round(self, jobs: Sequence[Job]) -> float:
        """Train all jobs; return the seconds."""
        torch.set_num_threads(1 if self._pooled else cores())
        begun = time.perf_counter()
        if self._pooled:
            with ThreadPoolExecutor(len(self._workers)) as pool:
                list(pool.map(self.work_off, self._workers, self._shares(jobs)))
        else:
            self.work_off(self._workers[0], jobs)
        return time.perf_counter() - begun

    def work_off(self, worker: Worker, jobs: Sequence[Job]) -> None:
        """Train jobs one by one."""
        for job in jobs:
            self._train(worker, job)

    def alone(self, jobs: Sequence[Job]) -> None:
        """Train jobs in this thread, for a count of their operations."""
        self.work_off(self._workers[0], jobs)

    def _shares(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Hand jobs out, the longest first, each to whoever has least."""
        shares: list[list[Job]] = [[] for _ in self._workers]
        for job in sorted(jobs, key=lambda j: -self._cost(j)):
            min(shares, key=lambda share: sum(self._cost(j) for j in share)).append(job)
        return shares

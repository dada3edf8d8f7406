"""Many runs, so many at once: which begins when, and how all end."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError

LOOK = 0.5
"""Seconds after which a signal is heard that came just before the main thread began to wait, and did not wake it."""


def next_run(waiting: Sequence[Config], running: Iterable[Config]) -> Config | None:
    """Return the first of waiting runs that starts from none above it or in progress; None if there is none."""
    not_over = {config.run_dir for config in running}
    for config in waiting:
        if not config.run.start_from or Path(config.run.start_from) not in not_over:
            return config
        not_over.add(config.run_dir)
    return None


def sweep(
    runs: Sequence[Config],
    at_once: int,
    run: Callable[[Config], object],
    begins: Callable[[Config], object],
    ended: Callable[[Config, FedjetsError | None], object],
    stop: Callable[[], object],
) -> None:
    """Do runs in their order, so many at once, each after the one that it starts from, done or failed.

    Whatever else than a failed run goes wrong in any thread, an interrupt included, stops all and is raised.

    Args:
        runs: their settings.
        at_once: how many, each in a thread of its own.
        run: does a run there; raises FedjetsError where it fails.
        begins: called before each, one at a time.
        ended: called after each, one at a time, with why it failed.
        stop: has the calls of ``run`` in progress end soon.
    """
    waiting, running = list(runs), dict[Future[object], Config]()
    with ThreadPoolExecutor(at_once) as threads:  # it waits for those that stop, too
        try:
            while waiting or running:
                while len(running) < at_once and (config := next_run(waiting, running.values())):
                    waiting.remove(config)
                    begins(config)
                    running[threads.submit(run, config)] = config
                for future in wait(running, LOOK, FIRST_COMPLETED).done:
                    ended(running.pop(future), _failure(future))
        except BaseException:
            stop()
            raise


def _failure(future: "Future[object]") -> FedjetsError | None:
    try:
        future.result()
    except FedjetsError as error:
        return error
    return None

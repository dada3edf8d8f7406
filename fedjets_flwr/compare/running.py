"""Doing an experiment's runs: those that are not done, with progress, and a table that grows with them."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fedjets_flwr.compare.experiment import Experiment, done
from fedjets_flwr.compare.sweep import sweep
from fedjets_flwr.compare.table import draw_results, write_results
from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.launch.display import Display
from fedjets_flwr.launch.follow import check
from fedjets_flwr.release import code_digest
from fedjets_flwr.runs.checkpoint import RunLock
from fedjets_flwr.runs.tracking import write_json


def run_experiment(
    experiment: Experiment,
    folder: Path,
    run: Callable[[Config, Display], object],
    console: Console,
    validate: Callable[[Config], None],
    at_once: int = 1,
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Do the runs that are not done, going on where one was cut off, so many at once; write the table after each.

    Args:
        experiment: the rows.
        folder: takes the table and its figures.
        run: does a run, in another thread than this one; raises FedjetsError where it fails.
        console: where progress is shown.
        validate: raises FedjetsError where a method refuses settings.
        at_once: runs at a time.
        stop: has those in progress end soon, when this thread is interrupted.

    Raises:
        FedjetsError: before the first run, if a row cannot run; at the end, if a run failed: what is done stays.
    """
    runs = {config.run_dir: config for _, configs in experiment.rows for config in configs}
    _check_rows(experiment, validate)
    numbers = {run_dir: number for number, run_dir in enumerate(runs, start=1)}
    finished = {run_dir: summary for run_dir in runs if (summary := done(run_dir)) is not None}
    waiting = [_resumed(config) for run_dir, config in runs.items() if run_dir not in finished]
    if old := [path for path, summary in finished.items() if summary.get("code") != code_digest()]:
        console.print(
            f"{len(old)} of {len(runs)} runs are done, by other code of this app, and stand in the table as they are;"
            f" delete their folders to do them again: {', '.join(path.name for path in old)} in {old[0].parent}",
            soft_wrap=True,
        )
    over, failed, began = 0, list[str](), time.monotonic()

    def time_left() -> str:
        if not over:
            return ""
        return f"about {(len(waiting) - over) * (time.monotonic() - began) / over / 60:.0f} minutes left"

    def begins(config: Config) -> None:
        left = time_left()
        display.tell(config.run_name, f"run {numbers[config.run_dir]} of {len(runs)}{left and ', '}{left}")

    def ended(config: Config, error: FedjetsError | None) -> None:
        nonlocal over
        over += 1
        display.update(bar, advance=1, left=time_left())
        if error is not None:
            failed.append(config.run_name)
            _keep_reason(config, error)
            display.tell(config.run_name, Text.assemble(("failed", "bold red"), f": {error}"))
        write_results(experiment, folder)

    with Display(console, at_once) as display, display.bar("runs", len(runs), len(runs) - len(waiting), "") as bar:
        sweep(waiting, at_once, lambda config: run(config, display), begins, ended, stop)
    write_results(experiment, folder)
    draw_results(experiment, folder)
    console.print((folder / "table.md").read_text())
    console.print(str(folder), soft_wrap=True)
    if failed:
        raise FedjetsError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; run again to retry them")


def _resumed(config: Config) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"resume": True})})


def _check_rows(experiment: Experiment, validate: Callable[[Config], None]) -> None:
    for row, configs in experiment.rows:
        for config in configs:
            try:
                if done(config.run_dir) is None:
                    validate(config)
                    if not row.start:  # whose run may be one of these
                        check(config)
            except FedjetsError as error:
                raise FedjetsError(f"row {row.name!r}: {error}") from None


def _keep_reason(config: Config, error: FedjetsError) -> None:
    """Have the table show a run as failed that ended before its ServerApp could say why; not another's that goes on."""
    path = config.run_dir / "error.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FedjetsError), RunLock(config, seconds=0):
        if not path.is_file():
            write_json(path, {"status": "failed", "reason": str(error), "expected": True})

"""Which folder a run may write to: results that lie somewhere are lost to no run that did not ask for it.

A run without a name gets a folder of its own beside those of the same settings (``name``, ``name-2``, …); one with a
name that holds results is refused. With ``run.overwrite`` they are moved aside, deleted when the run has a checkpoint
of its own, and put back if it ends before.
"""

import re
import shutil
from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.files import written
from fedjets_flwr.runs.audit import AUDIT_LOG, head_of

BEFORE = ".before"
"""Folder in a run's folder that takes what an overwriting run found there."""
CHECKPOINTS = "checkpoints"
LEDGER = "releases.jsonl"
"""What the runs of a name let out of their clients' data: it stays whatever else goes."""
LOCK = ".lock"
_STAY = {BEFORE, LEDGER, LOCK, AUDIT_LOG, head_of(Path(AUDIT_LOG)).name}


def claimed(config: Config) -> Config:
    """Return the settings with the name of the folder that the run may write to; nothing is written yet.

    Raises:
        FedjetsError: the name that was given holds results, and the run neither resumes nor overwrites.
    """
    if not config.run.name:
        newest = next(iter(_numbers(config)), 0)
        goes_on = config.run.resume or config.run.overwrite
        config = config.named(_numbered(config.run_name, max(1, newest) if goes_on else newest + 1))
    _check_free(config)
    return config


def agreed(elsewhere: Config, here: Config) -> tuple[Config, Config]:
    """Return the settings of a run on another machine and of its results on this one, with one folder's name for both.

    Raises:
        FedjetsError: the name that was given holds results here; that machine looks for itself.
    """
    here = claimed(here)
    return elsewhere.named(here.run.name), here


def make_room(config: Config) -> None:
    """Move aside what a run overwrites; the caller holds the lock of its folder.

    Raises:
        FedjetsError: there are results, and the run neither resumes nor overwrites.
    """
    if not config.run.overwrite:
        put_back(config.run_dir)
        _check_free(config)
    elif _own_results(config.run_dir):
        _move_aside(config.run_dir)
    _keep_ledger(config)


def replaces(folder: Path) -> bool:
    """Return whether what a run found there is moved aside, and the run has no checkpoint of its own yet."""
    return (folder / BEFORE).is_dir() and not _has_checkpoint(folder)


def put_back(folder: Path) -> None:
    """Bring back what was moved aside, unless the run that overwrites it has a checkpoint of its own.

    What lies there of that run goes, but for its audit log. A call that was cut off is finished by the next one.
    """
    before = folder / BEFORE
    if not replaces(folder):
        return
    for path in sorted(before.iterdir(), key=lambda path: path.name == CHECKPOINTS):
        _delete(folder / path.name)
        path.rename(folder / path.name)
    before.rmdir()


def forget_before(folder: Path) -> None:
    """Delete what was moved aside, now that the run has a checkpoint of its own."""
    shutil.rmtree(folder / BEFORE, ignore_errors=True)


def holds_results(folder: Path) -> bool:
    """Return whether a run finished a round, or itself, or kept its state there, or has moved such results aside."""
    return _own_results(folder) or (folder / BEFORE).is_dir()


def _own_results(folder: Path) -> bool:
    metrics = folder / "metrics.jsonl"
    return (
        (folder / "summary.json").is_file()
        or (metrics.is_file() and metrics.stat().st_size > 0)
        or any((folder / CHECKPOINTS).glob("*.safetensors"))
    )


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("round-*.safetensors"))


def _check_free(config: Config) -> None:
    run = config.run
    if not (run.resume or run.overwrite) and holds_results(config.run_dir):
        raise FedjetsError(
            f"run.name = {config.run_name!r}: {config.run_dir} holds results; go on with --resume (run.resume),"
            " choose another name, or replace them with --overwrite (run.overwrite)"
        )


def _move_aside(folder: Path) -> None:
    """Keep what has a checkpoint, or else what was moved aside before: the run since then came to nothing."""
    before = folder / BEFORE
    if _has_checkpoint(folder):
        forget_before(folder)
    before.mkdir(exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name != CHECKPOINTS):
        if (before / path.name).exists():
            _delete(path)
        elif path.name not in _STAY:
            path.rename(before / path.name)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _numbered(base: str, number: int) -> str:
    return base if number == 1 else f"{base}-{number}"


def _number(base: str, name: str) -> int:
    """Return the number that :func:`_numbered` made a name of, or 0."""
    found = re.fullmatch(rf"{re.escape(base)}(?:-([2-9]|[1-9][0-9]{{1,8}}))?", name)
    return int(found[1] or 1) if found else 0


def _numbers(config: Config) -> list[int]:
    """Return the numbers of runs of these settings that hold results and were given no name, the highest first."""
    base, parent = config.named("").run_name, config.run_dir.parent
    paths = [path for path in parent.iterdir() if _number(base, path.name)] if parent.is_dir() else []
    return sorted((_number(base, path.name) for path in paths if holds_results(path)), reverse=True)


def _keep_ledger(config: Config) -> None:
    """Have a run that got a number count on from the one before it: both train on the same clients."""
    base, ledger = config.named("").run_name, config.run_dir / LEDGER
    numbers = [number for number in _numbers(config) if number < _number(base, config.run_name)]
    found = (config.named(_numbered(base, number)).run_dir / LEDGER for number in numbers)
    before = next((path for path in found if path.is_file()), None)
    if before is not None and not ledger.exists():
        with written(ledger) as file:
            shutil.copyfile(before, file)

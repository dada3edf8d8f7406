"""The ServerApp: settings -> common expert -> method -> prepared clients -> rounds -> results."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.cpus import cpu_count
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import weights_hash
from fedjets_flwr.federation.privacy import Ledger, check_accountant
from fedjets_flwr.models.common_expert import COMMON_EXPERT
from fedjets_flwr.models.pretraining import provide_common_expert, save_common_expert
from fedjets_flwr.report.plots import draw_or_say
from fedjets_flwr.runs.callback import Callback, installed_callbacks
from fedjets_flwr.runs.checkpoint import Checkpoints
from fedjets_flwr.runs.claim import claimed, put_back
from fedjets_flwr.runs.queue import RunQueue
from fedjets_flwr.runs.remote_log import Announcer
from fedjets_flwr.runs.stopping import StopRequest, error_facts
from fedjets_flwr.runs.tensorboard import TensorBoard
from fedjets_flwr.runs.tracking import Tracker, publish
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.binding import PINS, Binding, read_roster
from fedjets_flwr.wire.exchange import Exchange
from server_app.audit import Audit
from server_app.outcome import facts_of, log_results
from server_app.rounds import Rounds
from server_app.start import begin, check, newest_checkpoint, private_facts, request_facts, tell_controls
from server_app.stoppable import StoppableGrid
from strategies import strategy

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do the run of the settings, or all that come in a queue; a run that fails ends the Flower run as failed."""
    # Not by Ray, which a simulation may still be importing in another thread.
    announce = None if isinstance(grid, InMemoryGrid) else Announcer()
    if (queue := RunQueue.here()) is None:
        config, checkpoints = opened(context.run_config, announce)
        do(grid, context.run_id, config, checkpoints, announce)
        draw_or_say(config.run_dir, log.warning)
        return
    for asked in queue:
        reason, told = "", {"settings": json.dumps(asked.settings)}
        try:
            config, checkpoints = opened(asked.settings, announce)
            with logged_to(config.run_dir / "run.log"):  # a folder that is locked for this run by now
                do(grid, context.run_id, config, checkpoints, announce, told, since=asked.since)
        except Exception as error:
            reason = str(error_facts(error)["reason"])
        queue.answer(asked.number, reason)


def do(
    grid: Grid,
    flower_run: int,
    config: Config,
    checkpoints: Checkpoints,
    announce: Announcer | None,
    told: Mapping[str, str] | None = None,
    since: float | None = None,
) -> None:
    """Do a run, whose folder tells how it ended, and let go of the folder.

    Args:
        grid: to the clients.
        flower_run: Flower's id of the run.
        config: the settings.
        checkpoints: of the run, which hold its folder.
        announce: takes what is written, for a launcher elsewhere.
        told: what every request tells, besides what the method says.
        since: when somebody began to wait for it, in seconds since 1970.
    """
    request = StopRequest(config.run_dir, str(flower_run))
    try:
        run(cast(Grid, StoppableGrid(grid, request)), config, checkpoints, announce, told, since)
    except (Exception, SystemExit) as error:  # SystemExit: Flower's way to stop a deployed ServerApp
        with suppress(OSError):  # the next run does it, too; what ended this one must be told
            put_back(config.run_dir)
        publish(config.run_dir / "error.json", error_facts(error, request.made()), announce)
        raise
    finally:
        checkpoints.close()


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Write what is logged meanwhile to a file."""
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(levelname)s :      %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def opened(settings: Mapping[str, Scalar], announce: Announcer | None) -> tuple[Config, Checkpoints]:
    """Return the settings and the checkpoints, which hold the lock of the run's folder: it is this run's from now on.

    Raises:
        FedjetsError: the settings are wrong, or the folder is another run's; nothing is written there.
    """
    try:
        config = claimed(Config.from_flat(settings))
        return config, Checkpoints(config)
    except FedjetsError as error:
        if announce is not None:
            announce("error.json", error_facts(error))
        raise


def run(
    grid: Grid,
    config: Config,
    checkpoints: Checkpoints,
    announce: Announcer | None = None,
    told: Mapping[str, str] | None = None,
    since: float | None = None,
) -> Rounds:
    """Do a whole run, write its folder and return the rounds, with the method's final state; see :func:`do`."""
    began = time.time()
    before = {} if since is None else {"launch": round(began - since, 3)}
    torch.set_num_threads(cpu_count())
    wanted = strategy(config.strategy.name)
    wanted.validate(config)
    told_at_end = config.privacy.route_epsilon > 0 and Ledger(config.run_dir).read()[0]
    if config.privacy.noise_multiplier > 0 or told_at_end:
        check_accountant()
    # Before the common expert, which may take minutes: its extra may be missing.
    own: list[Callback] = [TensorBoard(config.run_dir)] if config.run.tensorboard else []
    roster = read_roster(config)
    tracker = Tracker(config, announce)
    (config.run_dir / "error.json").unlink(missing_ok=True)
    open_task(config).deal()
    common = provide_common_expert(config, tracker.say)
    checkpoints.common = common.digest
    method = wanted(config, common, open_task(config, common))
    check(method, tracker.warn)
    audit = Audit(config, common.digest)
    callbacks = [tracker, checkpoints, audit, *own, *installed_callbacks(config)]
    found = newest_checkpoint(config, tracker, checkpoints)
    save_common_expert(common, config.run_dir / COMMON_EXPERT)
    binding = Binding(roster, config.run_dir / PINS, resume=config.run.resume)
    facts = request_facts(method) | private_facts(method, found, checkpoints) | dict(told or {})
    exchange = Exchange(grid, config, common, facts, binding)
    exchange.when_read = audit.on_exchange
    try:
        rounds, first = begin(method, exchange, tracker, checkpoints, callbacks, found)
        rounds.summary()
        before["prepare"] = round(time.time() - began, 3)
        rounds.start(grid, first=first)
    finally:
        exchange.close()
    tell_controls(tracker, config, rounds.clients.prepared)  # of sites that came late, too
    results = facts_of(method, rounds) | {
        "seconds_before": before,
        "wire_bytes_total": exchange.moved,
        "jobs_by_transport": dict(sorted(exchange.sent.items())),
    }
    summary = tracker.finish("completed", weights_hash(method.vectors), results)
    for callback in callbacks:
        callback.on_end(summary)
    log_results(summary)
    log.info("results in %s", config.run_dir)
    return rounds

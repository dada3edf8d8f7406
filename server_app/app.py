"""The ServerApp: settings -> common expert -> method -> rounds -> results."""

import logging
import os
from typing import cast

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.clients import open_dataset, open_split
from fedjets_flwr.federation.aggregation import weights_hash
from fedjets_flwr.models.common_expert import COMMON_EXPERT
from fedjets_flwr.models.pretraining import provide_common_expert, save_common_expert
from fedjets_flwr.report.plots import draw_plots
from fedjets_flwr.runs.checkpoint import Checkpoints
from fedjets_flwr.runs.remote_log import Announcer
from fedjets_flwr.runs.stopping import StopRequest, error_facts
from fedjets_flwr.runs.tracking import Tracker, publish
from server_app.stoppable import StoppableGrid
from strategies import method
from strategies.base import Method

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the method that the settings name; anything that fails ends the Flower run as failed."""
    config = Config.from_flat(context.run_config)
    checkpoints = Checkpoints(config)  # holds the lock: what is below writes to the run folder
    # Not by Ray, which a simulation may still be importing in another thread.
    announce = None if isinstance(grid, InMemoryGrid) else Announcer()
    request = StopRequest(config.run_dir, str(context.run_id))
    try:
        run(cast(Grid, StoppableGrid(grid, request)), config, checkpoints, announce)
        draw_plots(config.run_dir)
    except (Exception, SystemExit) as error:  # SystemExit: Flower's way to stop a deployed ServerApp
        publish(config.run_dir / "error.json", error_facts(error, request.made()), announce)
        raise


def run(grid: Grid, config: Config, checkpoints: Checkpoints, announce: Announcer | None = None) -> Method:
    """Run all rounds, write the run folder and return the method with its final state."""
    torch.set_num_threads(os.cpu_count() or 1)
    wanted = method(config.strategy.name)
    wanted.validate(config)
    tracker = Tracker(config, announce)
    (config.run_dir / "error.json").unlink(missing_ok=True)
    dataset = open_dataset(config)
    if len(dataset.train):
        open_split(config)
    common = provide_common_expert(config, lambda text: tracker.say(text))
    checkpoints.common = common.digest
    save_common_expert(common, config.run_dir / COMMON_EXPERT)
    strategy = wanted(config, common, dataset, tracker, checkpoints)
    strategy.summary()
    strategy.start(grid)
    facts = strategy.facts() | {"wire_bytes_total": strategy.exchange.moved}
    summary = tracker.finish("completed", weights_hash(strategy.vectors), facts)
    if summary["accuracy"] is not None:
        common_accuracy = summary["common_expert_accuracy"]
        log.info("unseen clients: accuracy %.4f (common expert %.4f)", summary["accuracy"], common_accuracy)
    log.info("results in %s", config.run_dir)
    return strategy

"""The ServerApp: settings -> common expert -> method -> prepared clients -> rounds -> results."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from torch import Tensor

from fedjets_flwr.config.schema import Config, Scalar
from fedjets_flwr.cpus import cpu_count
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import weights_hash
from fedjets_flwr.federation.privacy import Ledger, check_accountant, check_noise_fits, spent
from fedjets_flwr.models.architectures import Architecture
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.models.common_expert import COMMON_EXPERT
from fedjets_flwr.models.expert import encode_architectures
from fedjets_flwr.models.flat_model import digest_of
from fedjets_flwr.models.flops import forward_flops
from fedjets_flwr.models.pretraining import provide_common_expert, save_common_expert
from fedjets_flwr.names import UNSEEN, VALIDATION, expert_ids, expert_name
from fedjets_flwr.report.plots import draw_or_say
from fedjets_flwr.runs.callback import Callback, installed_callbacks
from fedjets_flwr.runs.checkpoint import Checkpoint, Checkpoints
from fedjets_flwr.runs.claim import claimed, put_back
from fedjets_flwr.runs.private_folder import check_seen, leave_mark, new_start
from fedjets_flwr.runs.queue import RunQueue
from fedjets_flwr.runs.remote_log import Announcer
from fedjets_flwr.runs.stopping import StopRequest, error_facts
from fedjets_flwr.runs.tensorboard import TensorBoard
from fedjets_flwr.runs.tracking import Tracker, publish
from fedjets_flwr.runs.trained_run import Serving, open_run
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.binding import PINS, Binding, read_roster
from fedjets_flwr.wire.exchange import Exchange
from server_app.audit import Audit
from server_app.preparation import Prepared, prepare_all
from server_app.rounds import Rounds
from server_app.stoppable import StoppableGrid
from strategies import Strategy, strategy

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
    check_noise(method)
    warn_of_seen_tests(config)
    check_surety(method)
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
    if summary["accuracy"] is not None:
        common_accuracy = summary["common_expert_accuracy"]
        log.info("unseen clients: accuracy %.4f (common expert %.4f)", summary["accuracy"], common_accuracy)
    if summary["participants"]:
        scored = summary["participants"]
        bits = f", {scored['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in scored else ""
        log.info("clients' own tests: accuracy %.4f%s", scored["local"], bits)
        for domain, means in scored.get("domains", {}).items():
            if scores := means.get("scores"):
                log.info("%s: %s", domain, ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    log.info("results in %s", config.run_dir)
    return rounds


def check_noise(method: Strategy) -> None:
    """Raise FedjetsError if noise would fall on running statistics, once the experts are known."""
    config = method.config
    if config.privacy.noise_multiplier > 0 and config.starts_from_clients:
        log.warning(
            "privacy.noise-multiplier: no noise covers the common expert, which is trained on the clients' own samples;"
            " set partition.public-share above 0, or name one by common-expert.path"
        )
    if config.privacy.noise_multiplier > 0:
        check_noise_fits(config, any(spec.size > spec.trained for spec in method.specs.values()))


def warn_of_seen_tests(config: Config) -> None:
    """Say where clients that train are scored on images that the models' start was trained on."""
    if config.partition.test_share and config.partition.name != "majority" and config.starts_from_clients:
        log.warning(
            "partition.test-share: the common expert is trained on clients' own test parts, too; set"
            " partition.public-share above 0, or name one by common-expert.path"
        )


def check_surety(method: Strategy) -> None:
    """Raise FedjetsError if clients are to compare experts with a common expert that does not tell how sure it is."""
    if method.vouched and math.isnan(method.common.usual_entropy):
        raise FedjetsError(
            "personalize.read-out = 'familiar': the common expert does not tell how sure it usually is; have one"
            " trained with partition.public-share above 0, or choose another read-out"
        )


def private_facts(method: Strategy, found: Checkpoint | None, checkpoints: Checkpoints) -> dict[str, str]:
    """Return what every request tells of a method's private states: the start that they belong to.

    A resumed run goes on with those of the run that it resumes, a fresh one with none.
    """
    if not method.keeps_state:
        return {}
    checkpoints.start = (found.facts.get("start", "") if found else "") or new_start(method.config)
    leave_mark(method.config, checkpoints.start)
    return {"private": checkpoints.start}


def begin(
    method: Strategy,
    exchange: Exchange,
    tracker: Tracker,
    checkpoints: Checkpoints,
    callbacks: list[Callback],
    found: Checkpoint | None,
) -> tuple[Rounds, int]:
    """Give the method its state, prepare the clients and choose anchors; return the rounds and the first one to do."""
    config = method.config
    method.vectors = found.vectors if found else start_of(method)
    if found is not None:
        method.recall(found.facts.get("method", {}))
    checkpoints.notes = method.notes
    method.anchors = tuple(found.facts["anchors"]) if found else ()
    choose = config.cohort.anchor_selection != "partition" and not method.anchors
    prepared = prepare_all(exchange, config, tracker.say, choose)
    if method.keeps_state:
        hosts = exchange.nodes.hosts.values()
        check_seen(config, all(host.sees_private for host in hosts if host.any_client))
    tell_controls(tracker, config, prepared)
    if not method.anchors:
        method.anchors = prepared.anchors(config) if choose else tuple(range(config.num_anchors))
    if method.drawn == "anchored" and (out := sorted(set(method.anchors) & prepared.opted_out)):
        log.warning("anchors opted out: clients %s; nobody leads their experts", ", ".join(map(str, out)))
    checkpoints.anchors = method.anchors
    return Rounds(method, exchange, prepared, callbacks), found.server_round + 1 if found else min(1, config.run.rounds)


def tell_controls(tracker: Tracker, config: Config, prepared: Prepared) -> None:
    """Have the summary say what the common expert reaches alone on the clients that never train."""
    unseen, validation = (prepared.labelled(config, role) for role in (UNSEEN, VALIDATION))
    of_validation = prepared.controls(validation) if validation else None
    tracker.set_controls(prepared.controls(unseen), prepared.per_client(unseen), prepared.computed, of_validation)


def start_of(method: Strategy) -> dict[str, Tensor]:
    """Return the state before round 1: the method's own, or what it has of the run in ``run.start-from``.

    Raises:
        FedjetsError: that is no finished run, or its models are of another size.
    """
    own, folder = method.state(), method.config.run.start_from
    if not folder:
        return own
    theirs = open_run(folder).vectors
    single = theirs["expert.0"] if len(expert_ids(theirs)) == 1 else None
    for name, vector in own.items():
        if name not in method.specs:
            continue  # SCAFFOLD's c is the mean of what clients hold, who begin with nothing
        taken = single if single is not None and name.startswith("expert.") else theirs.get(name)
        if taken is None and name.startswith("expert."):
            raise FedjetsError(f"run.start-from = {folder!r}: it has no {name}; lower moe.experts")
        if taken is not None and taken.shape != vector.shape:
            raise FedjetsError(
                f"run.start-from = {folder!r}: its {name} is of another size; set model.* and moe.* alike"
            )
        own[name] = vector if taken is None else taken.clone()
    return own


def newest_checkpoint(config: Config, tracker: Tracker, checkpoints: Checkpoints) -> Checkpoint | None:
    """Return where a resumed run goes on, if there is anything; what came after it goes.

    Raises:
        FedjetsError: the run is finished, and none of its checkpoints is there and whole.
    """
    found = checkpoints.newest() if config.run.resume else None
    if config.run.resume and found is None and (config.run_dir / "summary.json").is_file():
        raise FedjetsError(
            f"{config.run_dir}: no whole checkpoint to go on from, and the run is finished; --overwrite replaces it"
        )
    tracker.cut_back(found.server_round if found else 0)
    if found is not None:
        log.info("going on after round %d", found.server_round)
    return found


def request_facts(method: Strategy) -> dict[str, str]:
    """Return what every request tells of the method's experts, so that clients build the same."""
    architectures = method.architectures
    kinds = architectures[:1] if len(set(architectures)) == 1 else architectures  # one stands for all that are alike
    return {
        "experts": encode_architectures(kinds),
        "layout": digest_of(method.specs[expert_name(m)] for m in range(len(kinds))),
        **({"samples": method.task.digest} if method.task.digest else {}),
    }


def facts_of(method: Strategy, rounds: Rounds) -> dict[str, object]:
    """Return what ``summary.json`` says of a method besides its results."""
    served, config = method.experts_served, method.config
    served_apart = method.opted_out.intersection(rounds.clients.participants)
    p, whole = config.privacy, method.task.sample_input()
    sample = Backbone(method.common, config.moe.trainable).sample_input(whole)
    serves = method.serves_unseen and method.task.classifies
    shape = method.task.spec.shape
    return {
        "privacy": spent(*rounds.clients.ledger.read(), p.delta) if p.noise_multiplier or p.route_epsilon else {},
        "classes": list(method.task.spec.classes),
        "kinds": list(method.task.spec.kinds),
        **({"context": shape[0]} if config.of_text else {"image_shape": list(shape)}),
        "samples_digest": method.task.digest,
        "anchors": list(method.anchors),
        "trained_parameters": method.trained_parameters,
        "flops_per_answer": served * forward_flops(method.build(0), sample),
        "common_expert_parameters": method.common.num_parameters,
        "bytes_setup": len(method.common.as_bytes) * len(method.num_samples.keys() | served_apart),
        **method.results(),
        "serving": serving_of(method).model_dump(mode="json") if serves else None,
    }


def serving_of(method: Strategy) -> Serving:
    """Return how the method serves a client that never trained."""
    architectures = tuple(kind for kind in method.architectures if isinstance(kind, Architecture))
    return Serving(read_out=method.read_out, routed=method.routed, architectures=architectures)

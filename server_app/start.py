"""What a run begins with: the method's state, its checks, prepared clients and anchors."""

import logging
import math
from collections.abc import Collection

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.privacy import check_noise_fits
from fedjets_flwr.models.expert import encode_architectures
from fedjets_flwr.models.flat_model import digest_of
from fedjets_flwr.models.pretraining import Progress
from fedjets_flwr.names import UNSEEN, VALIDATION, expert_ids, expert_name
from fedjets_flwr.runs.callback import Callback
from fedjets_flwr.runs.checkpoint import Checkpoint, Checkpoints
from fedjets_flwr.runs.private_folder import check_seen, leave_mark, new_start
from fedjets_flwr.runs.tracking import Tracker
from fedjets_flwr.runs.trained_run import open_run
from fedjets_flwr.wire.exchange import Exchange
from fedjets_flwr.wire.nodes import Host
from server_app.preparation import Prepared, prepare_all
from server_app.rounds import Rounds
from strategies import Strategy

log = logging.getLogger("flwr")


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
    hosts = exchange.nodes.hosts.values()
    warn_of_imitated_precision(config, hosts, tracker.warn)
    if method.keeps_state:
        check_seen(config, all(host.sees_private for host in hosts if host.any_client))
    tell_controls(tracker, config, prepared)
    if not method.anchors:
        method.anchors = prepared.anchors(config) if choose else tuple(range(config.num_anchors))
    if method.drawn == "anchored" and (out := sorted(set(method.anchors) & prepared.opted_out)):
        tracker.warn(f"anchors opted out: clients {', '.join(map(str, out))}; nobody leads their experts")
    checkpoints.anchors = method.anchors
    return Rounds(method, exchange, prepared, callbacks), found.server_round + 1 if found else min(1, config.run.rounds)


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


def private_facts(method: Strategy, found: Checkpoint | None, checkpoints: Checkpoints) -> dict[str, str]:
    """Return what every request tells of a method's private states: the start that they belong to.

    A resumed run goes on with those of the run that it resumes, a fresh one with none.
    """
    if not method.keeps_state:
        return {}
    checkpoints.start = (found.facts.get("start", "") if found else "") or new_start(method.config)
    leave_mark(method.config, checkpoints.start)
    return {"private": checkpoints.start}


def request_facts(method: Strategy) -> dict[str, str]:
    """Return what every request tells of the method's experts, so that clients build the same."""
    architectures = method.architectures
    kinds = architectures[:1] if len(set(architectures)) == 1 else architectures  # one stands for all that are alike
    return {
        "experts": encode_architectures(kinds),
        "layout": digest_of(method.specs[expert_name(m)] for m in range(len(kinds))),
        **({"samples": method.task.digest} if method.task.digest else {}),
    }


def check(method: Strategy, warn: Progress) -> None:
    """Raise FedjetsError if settings do not suit the experts and the common expert; warn of what is unwise."""
    check_noise(method, warn)
    warn_of_seen_tests(method.config, warn)
    check_surety(method)


def check_noise(method: Strategy, warn: Progress) -> None:
    """Raise FedjetsError if noise would fall on running statistics, once the experts are known."""
    config = method.config
    if config.privacy.noise_multiplier > 0 and config.starts_from_clients:
        warn(
            "privacy.noise-multiplier: no noise covers the common expert, which is trained on the clients' own samples;"
            " set partition.public-share above 0, or name one by common-expert.path"
        )
    if config.privacy.noise_multiplier > 0:
        check_noise_fits(config, any(spec.size > spec.trained for spec in method.specs.values()))


def warn_of_imitated_precision(config: Config, hosts: Collection[Host], warn: Progress) -> None:
    """Say where clients compute on CPUs that take longer in the precision that was chosen."""
    if imitating := sum(host.imitates for host in hosts):
        warn(
            f"train.precision = {config.train.precision!r}: the CPUs of {imitating} of {len(hosts)} SuperNodes only"
            " imitate it, and training there takes many times as long; set it to 'float32'"
        )


def check_surety(method: Strategy) -> None:
    """Raise FedjetsError if clients are to compare experts with a common expert that does not tell how sure it is."""
    if method.vouched and math.isnan(method.common.usual_entropy):
        raise FedjetsError(
            "personalize.read-out = 'familiar': the common expert does not tell how sure it usually is; have one"
            " trained with partition.public-share above 0, or choose another read-out"
        )


def warn_of_seen_tests(config: Config, warn: Progress) -> None:
    """Say where clients that train are scored on images that the models' start was trained on."""
    if config.partition.test_share and config.partition.name != "majority" and config.starts_from_clients:
        warn(
            "partition.test-share: the common expert is trained on clients' own test parts, too; set"
            " partition.public-share above 0, or name one by common-expert.path"
        )


def tell_controls(tracker: Tracker, config: Config, prepared: Prepared) -> None:
    """Have the summary say what the common expert reaches alone on the clients that never train."""
    unseen, validation = (prepared.labelled(config, role) for role in (UNSEEN, VALIDATION))
    of_validation = prepared.controls(validation) if validation else None
    tracker.set_controls(prepared.controls(unseen), prepared.per_client(unseen), prepared.computed, of_validation)

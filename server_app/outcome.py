"""What ``summary.json`` and the log say of a run in the end."""

import logging
from collections.abc import Mapping
from typing import Any

from fedjets_flwr.federation.privacy import spent
from fedjets_flwr.models.architectures import Architecture
from fedjets_flwr.models.backbone import Backbone
from fedjets_flwr.models.flops import forward_flops
from fedjets_flwr.runs.trained_run import Serving
from server_app.rounds import Rounds
from strategies import Strategy

log = logging.getLogger("flwr")


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


def log_results(summary: Mapping[str, Any]) -> None:
    """Log what a run reached, as its summary says."""
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

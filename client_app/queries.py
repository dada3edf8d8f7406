"""What clients compute without training: embeddings, expert choice, evaluation."""

import secrets
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from client_app.client import Local, Site
from fedjets_flwr.federation.privacy import randomise
from fedjets_flwr.moe.gating import chosen_weights, entropy, top_k_experts
from fedjets_flwr.moe.local_training import gate_scores, predict
from fedjets_flwr.moe.metrics import count_answers, count_inspection, right_answers
from fedjets_flwr.wire.messages import Job, Number

Result = tuple[dict[str, Tensor], dict[str, Number]]


def prepare(site: Site, job: Job, server_round: int, _: Mapping[str, Tensor]) -> Result:
    """Embed the client's data; report its size and, of an unseen client with labels, the controls' right answers.

    Its mean embedding goes along only if the server is to choose anchors by it.
    """
    local = site.local(job.client)
    labelled = local.data.images.labelled
    numbers: dict[str, Number] = {
        "num-examples": len(local), "computed": int(local.computed), "labelled": int(labelled)
    }  # fmt: skip
    vectors = {"mean-embedding": local.embedding.mean(dim=0)} if "mean-embedding" in job.numbers else {}
    if labelled and not local.data.training:
        numbers["common-right"] = right_answers(local.embedded.logits.softmax(1), local.data.images.labels)
    return vectors, numbers


def route(site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]) -> Result:
    """Choose the client's K experts by the gate it was sent."""
    sample_scores = _scores(site, site.local(job.client), vectors)
    c = site.config
    # Not from the root seed: the server knows it and could undo the randomisation.
    rng = np.random.default_rng(secrets.randbits(128))
    chosen = top_k_experts(sample_scores, c.moe.top_k)
    return {}, {"experts": list(randomise(chosen, c.moe.experts, c.privacy.route_epsilon, rng))}


def evaluate(site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]) -> Result:
    """Answer every sample with the experts that the client received; labels only score."""
    local = site.local(job.client)
    ids, probs = _predict(site, local, job, vectors)
    if "gate" in job.vectors:
        sample_scores = _scores(site, local, vectors)
    else:
        sample_scores = gate_scores(None, local.embedding, max(ids) + 1, site.device)
    numbers: dict[str, Number] = {"num-examples": len(local), "gate-entropy": float(entropy(sample_scores).mean())}
    weights = chosen_weights(sample_scores, ids, renormalise=False)
    return {}, numbers | count_answers(
        probs, weights, local.embedded.logits.softmax(1), ids, local.data.images.labels, len(site.dataset.classes)
    )


def inspect(site: Site, job: Job, server_round: int, vectors: Mapping[str, Tensor]) -> Result:
    """Count every expert's right answers by class: a diagnostic, not a part of any method."""
    local = site.local(job.client)
    _, probs = _predict(site, local, job, vectors)
    return {}, {"right": count_inspection(probs, local.data.images.labels, len(site.dataset.classes))}


def _predict(site: Site, local: Local, job: Job, vectors: Mapping[str, Tensor]) -> tuple[list[int], Tensor]:
    ids = [int(name.removeprefix("expert.")) for name in job.vectors if name.startswith("expert.")]
    experts = site.experts([vectors[f"expert.{m}"] for m in ids])
    return ids, predict(experts, site.inputs(local), len(local))


def _scores(site: Site, local: Local, vectors: Mapping[str, Tensor]) -> Tensor:
    """Return the gate's scores of all samples, (n, M), on the CPU."""
    if (oracle := site.oracle_scores(local)) is not None:
        return oracle.cpu()
    experts = site.config.moe.experts
    return gate_scores(site.gate(vectors["gate"], experts).module, local.embedding, experts, site.device)

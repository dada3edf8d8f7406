"""What clients compute without training: embeddings, expert choice, evaluation."""

import secrets
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from client_app.client import ClientContext, Update
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import all_finite
from fedjets_flwr.federation.privacy import randomise
from fedjets_flwr.models.bottleneck import Bottleneck
from fedjets_flwr.models.calibration import mean_entropy
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.adabn import adapt_batch_norm
from fedjets_flwr.moe.controls import right_by_control
from fedjets_flwr.moe.gating import chosen_weights, entropy, keeps_common, surest, top_k_experts
from fedjets_flwr.moe.metrics import count_inspection, count_predictions
from fedjets_flwr.moe.mixture import gate_scores, predict
from fedjets_flwr.names import MICRO, USUAL
from fedjets_flwr.tasks.base import Inputs
from fedjets_flwr.wire.messages import Number


def prepare(context: ClientContext, _: Mapping[str, Tensor]) -> Update:
    """Embed the client's data; report its size and, of an unseen client with labels, the controls' right predictions.

    Its mean embedding goes along only if the server is to choose anchors by it.
    """
    data = context.data
    labelled = data.samples.labelled
    numbers: dict[str, Number] = {
        "num-examples": len(data), "computed": int(data.computed), "labelled": int(labelled)
    }  # fmt: skip
    vectors = {"mean-embedding": data.embedding.mean(dim=0)} if "mean-embedding" in context.job.numbers else {}
    if labelled and not data.samples.training:
        answers, temperature = (data.embedded.logits, context.adapted_logits()), context.runtime.common.temperature
        groups, held = context.runtime.groups_held
        numbers["common-right"] = right_by_control(answers, data.samples.targets, temperature, groups, held)
    return Update(vectors, numbers)


def route(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Choose the client's K experts by the gate it was sent."""
    return Update(numbers={"experts": list(chosen_experts(context, vectors))})


def chosen_experts(context: ClientContext, vectors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the K experts that the gate chooses for the client, best first, randomised as the settings say."""
    c = context.config
    # Not from the root seed: the server knows it and could undo the randomisation.
    rng = np.random.default_rng(secrets.randbits(128))
    chosen = top_k_experts(_scores(context, vectors), c.moe.top_k)
    return randomise(chosen, c.moe.experts, c.privacy.route_epsilon, rng)


def vouch(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Tell how sure the anchor's expert is of what it trains on: the mean entropy of its answers, in nats."""
    return Update(numbers={"usual-entropy": float(mean_entropy(expert_probabilities(context, vectors, "own"))[0])})


def evaluate(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Classify every sample with the experts that the client received; labels only score."""
    data, ids = context.data, context.job.experts
    probs = expert_probabilities(context, vectors)
    weights, sample_scores = read_out_weights(context, vectors, probs)
    answers, own = [(probs, weights)], probs
    if context.experts_have_batch_norm:
        own = expert_probabilities(context, vectors, "own")
        answers.append((own, read_out_weights(context, vectors, own)[0]))
    numbers: dict[str, Number] = {"num-examples": len(data), "gate-entropy": float(entropy(sample_scores).mean())}
    common, samples = data.embedded.logits.softmax(1), data.samples
    keep = _keeps_common(context, own[0])
    counts = count_predictions(answers, common, bool(keep), ids, samples.targets, samples.columns, context.num_columns)
    return Update(numbers=numbers | counts | ({} if keep is None else {"kept-common": int(keep)}))


def _keeps_common(context: ClientContext, own: Tensor) -> bool | None:
    """Return whether the client's samples are more familiar to the common expert; None: not asked to compare.

    ``own``: what the gate's first choice answers with batch-norm statistics of these samples, (n, C).
    """
    told = context.job.numbers
    if not told.keys() >= set(USUAL):
        return None
    expert, common = (told[name] / MICRO for name in USUAL)
    return keeps_common(own, context.adapted_logits().softmax(1), (expert, common))


def inspect(context: ClientContext, vectors: Mapping[str, Tensor]) -> Update:
    """Count every expert's right predictions by class or domain: a diagnostic, not a part of any method."""
    probs, samples = expert_probabilities(context, vectors), context.data.samples
    counts = count_inspection(probs, samples.targets, samples.columns, context.num_columns)
    return Update(numbers={"right": counts})


def expert_probabilities(context: ClientContext, vectors: Mapping[str, Tensor], statistics: str = "trained") -> Tensor:
    """Return the class probabilities of the job's experts, (K, n, C), on the CPU.

    ``statistics``: of batch norm, a word of ``metrics.STATISTICS``.
    """
    models, inputs = list(context.experts(vectors).values()), context.plain_inputs()
    if statistics == "own":
        for model in models:
            adapt_batch_norm(model.module, inputs, len(context.data))
    probs = _drawn(context, models, inputs)
    if not all_finite(probs):
        raise FedjetsError(f"an expert among {list(context.job.experts)} answers with numbers that are not finite")
    return probs


def _drawn(context: ClientContext, models: Sequence[FlatModel], inputs: Inputs) -> Tensor:
    """Return what models answer, (K, n, C); of those with a stochastic bottleneck the mean over ``fedsr.draws``."""
    necks = [part for model in models for part in model.module.modules() if isinstance(part, Bottleneck)]
    draws, count = context.config.fedsr.draws if necks else 0, len(context.data)
    if draws == 0:
        return predict(models, inputs, count)
    for neck in necks:
        neck.noise = context.generator("fedsr test", device=context.device)
    total = torch.stack([predict(models, inputs, count) for _ in range(draws)]).mean(dim=0)
    for neck in necks:
        neck.noise = None
    return total


def read_out_weights(context: ClientContext, vectors: Mapping[str, Tensor], probs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of the job's experts, (n, K), and the scores of all, (n, M), or of the K without a gate.

    ``probs``: what the experts answer, (K, n, C); without a gate the surest of them weighs alone.
    """
    if "gate" in context.job.vectors:
        sample_scores = _scores(context, vectors)
        return chosen_weights(sample_scores, context.job.experts, renormalise=False), sample_scores
    sample_scores = surest(probs).expand(probs.shape[1], -1)
    return chosen_weights(sample_scores, range(len(probs)), renormalise=False), sample_scores


def _scores(context: ClientContext, vectors: Mapping[str, Tensor]) -> Tensor:
    """Return the gate's scores of all samples, (n, M), on the CPU."""
    if (oracle := context.oracle_scores()) is not None:
        return oracle.cpu()
    return gate_scores(context.gate(vectors).module, context.data.embedding, context.device)

"""Every client algorithm on a real runtime against the same steps computed by hand, for clients of unequal sizes."""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from client_app.algorithms import (
    algorithms,
    fedadg,
    fedavg,
    fedjets,
    fedmix,
    fedmoe,
    fedprox,
    fedsr,
    finetune,
    ifca,
    local,
    scaffold,
    specialist,
)
from client_app.participants import as_received, predictions
from client_app.runtime import Runtime
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data.clients import open_client
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.expert import build_expert
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.local_training import batches
from fedjets_flwr.names import expert_id
from fedjets_flwr.seeds import torch_generator
from fedjets_flwr.wire.messages import Job, Number
from tests.support import by_hand
from tests.support.by_hand import Client, Vectors
from tests.support.tiny import CLASSES, EXPERTS, context_of, samples_of, start_vectors, tiny, tiny_runtime

ROUND = 3
CLIENTS = (0, 3)
ALL = tuple(f"expert.{m}" for m in range(EXPERTS))
adjusted = pytest.mark.parametrize("adjust", [False, True])
each_client = pytest.mark.parametrize("client", CLIENTS)


def exact(vectors: Mapping[str, Tensor]) -> Vectors:
    return {name: vector.double().numpy() for name, vector in vectors.items()}


def assert_equal(found: Mapping[str, Tensor], wanted: Vectors) -> None:
    assert set(found) == set(wanted)
    for name, vector in found.items():
        np.testing.assert_allclose(vector.double().numpy(), wanted[name], atol=2e-5, err_msg=name)


def trained_by(
    algorithm: ModuleType, runtime: Runtime, job: Job, server_round: int, vectors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Number]]:
    update = algorithm.train(context_of(runtime, job, server_round), vectors)
    return dict(update.vectors), dict(update.numbers)


def by_the_client(runtime: Runtime, client: int) -> Client:
    return Client(runtime.config, client, ROUND)


def test_the_clients_here_hold_unequal_numbers_of_samples_that_fill_no_whole_batches() -> None:
    sizes = [len(samples_of(tiny(), client)) for client in CLIENTS]
    assert len(set(sizes)) == 2
    assert sizes[1] % tiny().train.batch_size


def test_every_local_algorithm_is_found_by_its_name() -> None:
    found = algorithms()
    assert {name: algorithm.train for name, algorithm in found.items()} == {
        "fedadg": fedadg.train, "fedavg": fedavg.train, "fedjets": fedjets.train, "fedmix": fedmix.train,
        "fedmoe": fedmoe.train,
        "fedprox": fedprox.train, "fedsr": fedsr.train, "finetune": fedavg.train, "ifca": ifca.train, "local": None,
        "scaffold": scaffold.train, "specialist": fedavg.train,
    }  # fmt: skip
    own = {name: algorithm.adapt for name, algorithm in found.items() if algorithm.adapt is not as_received}
    assert own == {
        "fedmoe": fedmoe.adapt, "finetune": finetune.adapt, "ifca": ifca.adapt, "local": local.adapt,
        "specialist": specialist.adapt,
    }  # fmt: skip
    assert {name: algorithm.query for name, algorithm in found.items() if algorithm.query} == {"fedmoe": fedmoe.query}


@each_client
@adjusted
def test_supervised_steps(tmp_path: Path, client: int, adjust: bool) -> None:
    """Each model by itself, in an order of its own; the loss is the mean over the models."""
    runtime, start = tiny_runtime(tmp_path, train__logit_adjust=adjust), start_vectors("expert.0", "expert.2")
    trained, numbers = trained_by(fedavg, runtime, Job(client, ("expert.0", "expert.2")), ROUND, start)
    (first, loss_0), (second, loss_2) = (by_the_client(runtime, client).supervised(exact(start), m) for m in (0, 2))
    assert_equal(trained, first | second)
    assert numbers == {
        "num-examples": len(samples_of(runtime.config, client)), "loss": pytest.approx((loss_0 + loss_2) / 2, abs=1e-5)
    }  # fmt: skip


@each_client
@adjusted
def test_proximal_steps(tmp_path: Path, client: int, adjust: bool) -> None:
    runtime, start = tiny_runtime(tmp_path, train__logit_adjust=adjust, fedprox__mu=0.8), start_vectors("expert.0")
    trained, numbers = trained_by(fedprox, runtime, Job(client, ("expert.0",)), ROUND, start)
    wanted, loss = by_the_client(runtime, client).proximal(exact(start), 0.8)
    assert_equal(trained, wanted)
    assert numbers == {"num-examples": len(samples_of(runtime.config, client)), "loss": pytest.approx(loss, abs=1e-5)}


@each_client
@adjusted
def test_ifca_trains_the_model_that_fits_best(tmp_path: Path, client: int, adjust: bool) -> None:
    """The lowest loss on all its samples as they are, whichever place in the job that model has."""
    runtime, start = tiny_runtime(tmp_path, train__logit_adjust=adjust), start_vectors(*ALL)
    here = by_the_client(runtime, client)
    losses = {name: here.loss(vector) for name, vector in exact(start).items()}
    best = min(losses, key=losses.__getitem__)
    assert sorted(losses.values())[1] > losses[best] + 0.01
    wanted, loss = here.supervised({best: exact(start)[best]}, expert_id(best))
    for names in (ALL, ALL[::-1], (best,)):
        trained, numbers = trained_by(ifca, runtime, Job(client, names), ROUND, start)
        assert_equal(trained, {"trained": wanted[best]})
        n = len(samples_of(runtime.config, client))
        assert numbers == {"num-examples": n, "loss": pytest.approx(loss, abs=1e-5), "cluster": expert_id(best)}


@each_client
def test_a_training_client_of_ifca_is_answered_by_the_model_that_fits_its_samples(tmp_path: Path, client: int) -> None:
    """It has labels: the model that is surest of its test images may be another one."""
    runtime, start = tiny_runtime(tmp_path), start_vectors(*ALL)
    context = context_of(runtime, Job(client, ALL), ROUND)
    fits = ifca.best_fitting(context, context.experts(start))
    sure = next(m for m in range(EXPERTS) if m != fits)
    start[f"expert.{sure}"] = -50 * start[f"expert.{sure}"]
    found = ifca.adapt(context, start).predict(context)
    alone = context.expert(fits, start[f"expert.{fits}"])
    assert torch.equal(found, predictions(alone, context))


def test_ifca_passes_over_a_model_that_is_not_finite(tmp_path: Path) -> None:
    runtime, start = tiny_runtime(tmp_path), start_vectors(*ALL)
    context = context_of(runtime, Job(0, ALL), ROUND)
    fits = ifca.best_fitting(context, context.experts(start))
    broken = {**start, "expert.0": start["expert.0"] * float("nan")}
    assert ifca.best_fitting(context, context.experts(broken)) != 0
    if fits:
        assert ifca.best_fitting(context, context.experts(broken)) == fits
    with pytest.raises(FedjetsError, match="no model has a finite loss"):
        ifca.best_fitting(context, context.experts({name: v * float("nan") for name, v in start.items()}))


def test_where_models_are_equal_clients_of_ifca_draw_one_each(tmp_path: Path) -> None:
    """The draw is that of client and round, so that a resumed run repeats it."""
    runtime = tiny_runtime(tmp_path)
    start = dict.fromkeys(ALL, start_vectors("expert.0")["expert.0"])
    start["expert.1"] = 9 * start["expert.1"]  # fits nobody

    def drawn(client: int, server_round: int) -> Number:
        return trained_by(ifca, runtime, Job(client, ALL), server_round, start)[1]["cluster"]

    found = {(client, server_round): drawn(client, server_round) for client in range(7) for server_round in (1, 2)}
    assert set(found.values()) == {0, 2}
    assert found == {(client, server_round): drawn(client, server_round) for client, server_round in found}
    assert any(found[client, 1] != found[client, 2] for client in range(7))


@each_client
@adjusted
@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_steps(tmp_path: Path, client: int, adjust: bool, option: str) -> None:
    """Gradients plus (c - c_i); of option I also the full gradient at the start, the client's new variate."""
    runtime = tiny_runtime(tmp_path, train__logit_adjust=adjust, scaffold__option=option)
    start, name = start_vectors("expert.0"), f"correction.{client}"
    start[name] = start_vectors("expert.1")["expert.1"] / 4
    trained, numbers = trained_by(scaffold, runtime, Job(client, ("expert.0", name)), ROUND, start)
    here = by_the_client(runtime, client)
    wanted, loss = here.scaffold(exact(start), exact(start)[name])
    assert_equal(trained, wanted | ({f"variate.{client}": here.full_gradient(exact(start))} if option == "I" else {}))
    n = len(here.samples)
    assert numbers == {"num-examples": n, "loss": pytest.approx(loss, abs=1e-5), "steps": 2 * -(-n // 5)}


@each_client
@adjusted
@pytest.mark.parametrize("m", [0, 2])
def test_anchor_steps(tmp_path: Path, client: int, adjust: bool, m: int) -> None:
    runtime, start = tiny_runtime(tmp_path, train__logit_adjust=adjust), start_vectors(f"expert.{m}", "gate")
    job = Job(client, (f"expert.{m}", "gate"), numbers={"anchor": client})
    trained, numbers = trained_by(fedjets, runtime, job, ROUND, start)
    wanted, loss = by_the_client(runtime, client).anchor(exact(start), m)
    assert_equal(trained, wanted)
    assert numbers == {"num-examples": len(samples_of(runtime.config, client)), "loss": pytest.approx(loss, abs=1e-5)}


@each_client
@adjusted
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("mix", ["", "logits", "probs"])
def test_normal_steps(tmp_path: Path, client: int, adjust: bool, renormalise: bool, mix: str) -> None:
    """The experts come in the order of the gate's choice; without a setting the mixture is one of logits."""
    changes: dict[str, Scalar] = {"moe__mix": mix, "moe__renormalise": renormalise, "train__logit_adjust": adjust}
    runtime, start = tiny_runtime(tmp_path, **changes), start_vectors("expert.2", "expert.0", "gate")
    trained, numbers = trained_by(fedjets, runtime, Job(client, ("expert.2", "expert.0", "gate")), ROUND, start)
    wanted, loss = by_the_client(runtime, client).normal(exact(start), (2, 0), mix or "logits")
    assert_equal(trained, wanted)
    assert numbers == {"num-examples": len(samples_of(runtime.config, client)), "loss": pytest.approx(loss, abs=1e-5)}


@each_client
@adjusted
def test_mixture_steps(tmp_path: Path, client: int, adjust: bool) -> None:
    """A mixture of probabilities of all experts; then the scores of the trained gate, summed over the samples."""
    runtime, start = tiny_runtime(tmp_path, train__logit_adjust=adjust), start_vectors(*ALL, "gate")
    trained, numbers = trained_by(fedmix, runtime, Job(client, (*ALL, "gate")), ROUND, start)
    here = by_the_client(runtime, client)
    wanted, loss = here.normal(exact(start), range(EXPERTS), "probs")
    assert_equal(trained, wanted)
    mass = by_hand.scores(wanted["gate"], here.samples.h).sum(axis=0)
    assert numbers == {
        "num-examples": len(here.samples), "loss": pytest.approx(loss, abs=1e-5),
        "mass": pytest.approx(mass.tolist(), rel=1e-4),
    }  # fmt: skip


def test_a_gate_that_learns_from_anchors_is_trained_by_one(tmp_path: Path) -> None:
    runtime, start = tiny_runtime(tmp_path, gate__learns_from="anchors"), start_vectors("expert.1", "gate")
    job = Job(0, ("expert.1", "gate"), numbers={"anchor": 0})
    wanted, _ = by_the_client(runtime, 0).anchor(exact(start), 1)
    assert_equal(trained_by(fedjets, runtime, job, ROUND, start)[0], wanted)


@pytest.mark.parametrize("anchor", [True, False])
def test_a_random_gate_weights_the_experts_and_stays(tmp_path: Path, anchor: bool) -> None:
    runtime, start = tiny_runtime(tmp_path, gate__mode="random"), start_vectors("expert.1", "gate")
    job = Job(0, ("expert.1", "gate"), numbers={"anchor": 0} if anchor else {})
    trained, _ = trained_by(fedjets, runtime, job, ROUND, start)
    here = by_the_client(runtime, 0)
    wanted, _ = here.anchor(exact(start), 1) if anchor else here.normal(exact(start), (1,), "logits")
    assert_equal(trained, {"expert.1": wanted["expert.1"]})


@each_client
def test_an_oracle_weights_the_experts_by_the_labels_of_their_anchors(tmp_path: Path, client: int) -> None:
    """Weight 1 for the expert whose anchor holds most samples of the label, the lower one of equals, and 0 else."""
    runtime, start = tiny_runtime(tmp_path, gate__mode="oracle"), start_vectors(*ALL, "gate")
    trained, _ = trained_by(fedjets, runtime, Job(client, (*ALL, "gate")), ROUND, start)
    held = np.stack([np.bincount(samples_of(runtime.config, m).y, minlength=CLASSES) for m in range(EXPERTS)])
    here = by_the_client(runtime, client)
    oracle = np.eye(EXPERTS)[held.argmax(axis=0)[here.samples.y]]
    wanted, _ = here.normal(exact(start), range(EXPERTS), "logits", oracle)
    assert_equal(trained, {name: wanted[name] for name in ALL})


# Whole models: batch norm and augmentation ----------------------------------------------------------------------------

WHOLE: dict[str, Scalar] = {
    "moe__trainable": "all", "model__width": 2, "data__augment": "crop", "train__batch_size": 8,
    "train__schedule": "constant", "train__momentum": 0.0, "train__weight_decay": 0.0,
}  # fmt: skip


def whole(runtime: Runtime, m: int = 0) -> FlatModel:
    return FlatModel(build_expert(runtime.config, runtime.common, runtime.architecture(m), m, "random"))


def plainly_trained(runtime: Runtime, client: int, member: int, start: Tensor) -> Tensor:
    """Plain gradient steps on images that are cropped by draws of (round, client, member)."""
    model, c, local = whole(runtime), runtime.config, runtime.data(client)
    model.load(start)
    inputs = runtime.inputs(local, torch_generator(c.run.seed, "augment", ROUND, client, member))
    order = batches(len(local), 8, 2, torch_generator(c.run.seed, "batches", ROUND, client, member))
    model.module.train()
    for rows in order:
        loss = F.cross_entropy(model.module(inputs(rows)), local.targets[rows])
        for weight, gradient in zip(model.parameters, torch.autograd.grad(loss, model.parameters), strict=True):
            weight.data -= 0.3 * gradient
    return model.vector


def test_images_are_augmented_by_draws_of_round_client_and_model(tmp_path: Path) -> None:
    runtime = tiny_runtime(tmp_path, **WHOLE)
    start = {f"expert.{m}": whole(runtime, m).vector for m in (0, 2)}
    trained, _ = trained_by(fedavg, runtime, Job(3, ("expert.0", "expert.2")), ROUND, start)
    for m in (0, 2):
        torch.testing.assert_close(trained[f"expert.{m}"], plainly_trained(runtime, 3, m, start[f"expert.{m}"]))


def test_an_anchor_augments_its_images_too(tmp_path: Path) -> None:
    runtime = tiny_runtime(tmp_path, **WHOLE)
    start = {"expert.2": whole(runtime, 2).vector} | start_vectors("gate")
    trained, _ = trained_by(fedjets, runtime, Job(3, ("expert.2", "gate"), numbers={"anchor": 3}), ROUND, start)
    torch.testing.assert_close(trained["expert.2"], plainly_trained(runtime, 3, 0, start["expert.2"]))


def test_the_pull_of_fedprox_leaves_batch_norms_statistics_alone(tmp_path: Path) -> None:
    """However strong, it moves weights; the statistics are those of the first batch, one step from the start."""
    one_batch: dict[str, Scalar] = WHOLE | {"train__batch_size": 50, "train__local_epochs": 1}
    results = []
    for mu in (0.0, 100.0):
        runtime = tiny_runtime(tmp_path, **one_batch, fedprox__mu=mu)
        start = whole(runtime).vector
        trained, _ = trained_by(fedprox, runtime, Job(0, ("expert.0",)), ROUND, {"expert.0": start})
        results.append(trained["expert.0"].clone())
    assert torch.equal(*results)
    assert not torch.equal(results[0][whole(runtime).spec.trained :], start[whole(runtime).spec.trained :])


def test_the_full_gradient_is_that_of_the_model_in_eval_mode_on_images_as_they_are(tmp_path: Path) -> None:
    runtime = tiny_runtime(tmp_path, **WHOLE, scaffold__option="I")
    model = whole(runtime)
    start, zeros = model.vector.clone(), torch.zeros(whole(runtime).spec.trained)
    job = Job(0, ("expert.0", "correction.0"))
    trained, _ = trained_by(scaffold, runtime, job, ROUND, {"expert.0": start, "correction.0": zeros})
    images = open_client(runtime.config, 0).images
    plain = copy.deepcopy(model.module).eval()
    F.cross_entropy(plain(runtime.common.normalise(images.pixels)), images.labels).backward()
    wanted = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    torch.testing.assert_close(trained["variate.0"], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trained["expert.0"], plainly_trained(runtime, 0, 0, start))


# Precision ------------------------------------------------------------------------------------------------------------

JOBS = {
    "fedavg": (fedavg, Job(3, ("expert.0",), ("expert.0",), {})),
    "anchor": (fedjets, Job(3, ("expert.1", "gate"), ("expert.1", "gate"), {"anchor": 1})),
    "normal": (fedjets, Job(3, ("expert.1", "expert.0", "gate"), ("expert.1", "expert.0", "gate"), {})),
    "fedsr": (fedsr, Job(3, ("expert.0",), ("expert.0",), {})),
    "fedadg": (fedadg, Job(3, ("expert.0",), ("expert.0",), {})),
}


@pytest.mark.parametrize("name", JOBS)
def test_experts_train_in_the_precision_of_the_settings_and_their_weights_stay_whole(name: str, tmp_path: Path) -> None:
    """Losses, gate and weights are float32 all the same, and the step is nearly the same."""
    algorithm, job = JOBS[name]
    extra: dict[str, Scalar] = {"fedadg__reference": "fixed", "fedsr__stochastic": False}
    steps, seen = dict[str, Tensor](), dict[str, set[torch.dtype]]()
    for precision in ("float32", "bfloat16"):
        runtime = tiny_runtime(tmp_path, train__precision=precision, moe__trainable="all", moe__init="common", **extra)
        context = context_of(runtime, job, ROUND)
        vectors = {n: whole(runtime, expert_id(n)).vector.clone() for n in job.vectors if n != "gate"}
        vectors |= start_vectors("gate") if "gate" in job.vectors else {}
        start = {n: v.clone() for n, v in vectors.items()}
        dtypes = seen.setdefault(precision, set())
        for m in job.experts:
            conv = next(c for c in runtime.experts([m], [vectors[f"expert.{m}"]])[0].module.modules()
                        if isinstance(c, torch.nn.Conv2d))  # fmt: skip
            conv.register_forward_hook(lambda _, __, out, into=dtypes: into.add(out.dtype))
        update = algorithm.train(context, vectors)
        assert all(vector.dtype == torch.float32 for vector in update.vectors.values())
        steps[precision] = torch.cat([update.vectors[n] - start[n] for n in sorted(update.vectors)])
    assert seen == {"float32": {torch.float32}, "bfloat16": {torch.bfloat16}}
    assert not torch.equal(*steps.values())
    assert F.cosine_similarity(steps["float32"], steps["bfloat16"], dim=0) > 0.98

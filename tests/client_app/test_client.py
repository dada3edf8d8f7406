from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from client_app import queries
from client_app.algorithms import fedjets
from client_app.client import ClientContext, Work
from client_app.queries import evaluate
from client_app.runtime import Runtime
from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import Architecture, build
from fedjets_flwr.models.common_expert import CommonExpert, freeze
from fedjets_flwr.models.expert import build_configured_gate, build_expert, expert_architecture
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.moe.metrics import READINGS
from fedjets_flwr.tasks import open_task
from fedjets_flwr.wire.messages import Job, Number
from tests.support.tiny import context_of, start_vectors, tiny_runtime


def make_runtime(tmp_path: Path, **changes: Scalar) -> Runtime:
    """A process on the digits whose common expert is not of the experts' own architecture."""
    flat: dict[str, Scalar] = {"run.cache-dir": str(tmp_path), "run.device": "cpu", "model.width": 4}
    config = Config.from_flat(flat | {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()})
    architecture = Architecture("resnet8", 4, "batch", "cifar", 1, 10)
    common = CommonExpert(freeze(build(architecture, 3)), architecture, (0.3,), (0.4,), "digits", 0.5)
    return Runtime(config, common, [expert_architecture(config, common, open_task(config).spec, config.moe.init)])


def start(runtime: Runtime, *experts: int) -> dict[str, torch.Tensor]:
    c = runtime.config
    built = {m: build_expert(c, runtime.common, runtime.architecture(m), m, c.moe.init) for m in experts}
    found = {f"expert.{m}": FlatModel(expert).vector for m, expert in built.items()}
    return found | {"gate": FlatModel(build_configured_gate(c, runtime.common, c.moe.experts)).vector}


def work(
    what: Work, runtime: Runtime, job: Job, server_round: int, vectors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, Number]]:
    update = what(ClientContext(runtime, job, server_round, runtime.data(job.client)), vectors)
    return dict(update.vectors), dict(update.numbers)


@pytest.mark.parametrize("trainable", ["all", "stage", "head"])
def test_training_depends_on_round_and_client_alone(tmp_path: Path, trainable: str) -> None:
    """What the process did before leaves no trace: models are overwritten, momentum starts empty."""
    job = Job(6, ("expert.3", "expert.1", "gate"))
    first = make_runtime(tmp_path, moe__trainable=trainable)
    vectors = start(first, 3, 1)
    wanted, numbers = work(fedjets.train, first, job, 2, vectors)
    wanted = {name: vector.clone() for name, vector in wanted.items()}
    assert set(wanted) == {"expert.3", "expert.1", "gate"}
    assert numbers["num-examples"] == 100
    assert all(not torch.equal(wanted[name], vectors[name]) for name in wanted)
    work(fedjets.train, first, Job(7, ("expert.1", "expert.3", "gate")), 1, vectors)
    again, _ = work(fedjets.train, first, job, 2, vectors)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    other = {name: vector.clone() for name, vector in work(fedjets.train, first, job, 3, vectors)[0].items()}
    assert not torch.equal(other["expert.3"], wanted["expert.3"])


def test_a_random_gate_does_not_come_back(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path, gate__mode="random", moe__trainable="head")
    trained, _ = work(fedjets.train, runtime, Job(6, ("expert.0", "expert.4", "gate")), 1, start(runtime, 0, 4))
    assert set(trained) == {"expert.0", "expert.4"}


def test_experts_that_start_from_a_common_expert_of_another_architecture(tmp_path: Path) -> None:
    runtime = make_runtime(tmp_path, moe__init="common")
    vectors = start(runtime, 0)
    trained, _ = work(fedjets.train, runtime, Job(0, ("expert.0", "gate"), numbers={"anchor": 0}), 1, vectors)
    assert trained["expert.0"].shape == vectors["expert.0"].shape


def test_an_oracle_without_its_expert_still_reads_the_mixture(tmp_path: Path) -> None:
    """With one expert received, the mixture, the mean and top-1 are the same read-out."""
    runtime = make_runtime(tmp_path, gate__mode="oracle", moe__trainable="head", moe__init="common")
    _, numbers = work(queries.evaluate, runtime, Job(20, ("expert.0", "gate")), 1, start(runtime, 0))
    right = dict(zip(READINGS, numbers["right"], strict=True))  # type: ignore[arg-type]
    assert right["mixture/em"] == right["mean/em"] == right["top-1/em"]


def test_an_oracle_also_weights_the_training(tmp_path: Path) -> None:
    """The weights of an oracle come from the labels, so the vector of the gate must not matter."""
    runtime = make_runtime(tmp_path, gate__mode="oracle", moe__trainable="head")
    vectors = start(runtime, 0, 1)
    results = []
    for scale in (1.0, -3.0):
        job = Job(6, ("expert.0", "expert.1", "gate"))
        trained, _ = work(fedjets.train, runtime, job, 1, vectors | {"gate": scale * vectors["gate"]})
        results.append(trained["expert.0"].clone())
    assert torch.equal(*results)


def test_an_expert_that_answers_no_numbers_fails_its_evaluation(tmp_path: Path) -> None:
    runtime, start = tiny_runtime(tmp_path), start_vectors("expert.0", "expert.1", "gate")
    job = Job(7, ("expert.0", "expert.1", "gate"))
    assert evaluate(context_of(runtime, job, 1), start).numbers["num-examples"]
    start["expert.1"] = torch.full_like(start["expert.1"], torch.nan)
    with pytest.raises(FedjetsError, match=r"an expert among \[0, 1\] answers with numbers that are not finite"):
        evaluate(context_of(runtime, job, 1), start)

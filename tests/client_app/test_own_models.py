"""The models that clients make for themselves, step by step, and who is asked for what."""

from pathlib import Path
from typing import Any

import pytest
import torch

from client_app.algorithms import finetune, local
from client_app.client import ClientContext
from client_app.participants import as_received, fit_own, scored
from client_app.queries import evaluate
from client_app.runtime import Runtime
from client_app.state import ADAPTED, ClientState
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.architectures import build, tail
from fedjets_flwr.models.flat_model import FlatModel
from fedjets_flwr.models.pretraining import provide_common_expert
from fedjets_flwr.moe.early_stopping import mean_loss
from fedjets_flwr.moe.metrics import READINGS
from fedjets_flwr.runs.score import PARTICIPANTS_ACCURACY
from fedjets_flwr.seeds import derive
from fedjets_flwr.wire.messages import Job
from strategies.finetune import FineTune
from strategies.local import Local
from tests.support.text import Settings, text_folder, text_settings
from tests.support.tiny import context_of, start_vectors, tiny, tiny_method, tiny_runtime

__all__ = ["text_folder", "text_settings"]

PARTS: dict[str, Scalar] = {
    "partition__val_share": 0.25, "partition__test_share": 0.25, "partition__samples_per_client": 40,
    "adapt__lr": 0.02, "adapt__max_epochs": 12,
}  # fmt: skip
START = f"{'a' * 32}/{'b' * 32}"


def asked(runtime: Runtime, client: int = 2, server_round: int = 1, kept: bool = False) -> ClientContext:
    context = context_of(runtime, Job(client, ("expert.0",), (), {"reading": 0}), server_round)
    when = (server_round, ADAPTED)
    state = ClientState(runtime.config, START, client, when) if kept else None
    return ClientContext(runtime, context.job, server_round, context.data, state)


def test_without_an_epoch_a_fine_tuned_model_is_the_global_one(tmp_path: Path) -> None:
    runtime, start = tiny_runtime(tmp_path, **PARTS | {"adapt__max_epochs": 0}), start_vectors("expert.0")
    context = asked(runtime)
    finetune.adapt(context, start)
    assert torch.equal(runtime.experts([0], [torch.zeros(50)])[0].vector, torch.zeros(50))
    model = context.expert(0, start["expert.0"])
    assert fit_own(context, model).epochs == 0
    assert torch.equal(model.vector, start["expert.0"])


def test_a_client_keeps_its_own_model_as_it_was_when_it_was_tuned(text_settings: Settings) -> None:
    config = text_settings(strategy__name="local")
    common = provide_common_expert(config, lambda text: None)
    runtime = Runtime(config, common, [common.architecture])
    plain, tuned = (
        scored(local.adapt)(ClientContext(runtime, Job(1, (), (), numbers), 1, runtime.data(1), state), {})
        for numbers in ({"reading": 0}, {"reading": 0, "tuned": 1})
        for state in [ClientState(config, START, 1, (1, ADAPTED))]
    )
    assert torch.equal(plain.state["model"], tuned.state["model"])
    assert plain.numbers["bits-per-byte"] == tuned.numbers["bits-per-byte"] != tuned.numbers["tuned-bits-per-byte"]


def test_a_fine_tuned_model_is_the_global_one_trained_on_its_own_samples(tmp_path: Path) -> None:
    runtime, start = tiny_runtime(tmp_path, **PARTS), start_vectors("expert.0")
    context = asked(runtime)
    own = finetune.adapt(context, start).predict(context)
    model = context.expert(0, start["expert.0"])
    before = mean_loss(model, context.plain_inputs(), context.data.targets, context.task.total_loss)
    stopped = fit_own(context, model)
    assert mean_loss(model, context.plain_inputs(), context.data.targets, context.task.total_loss) < before - 0.1
    val = context.on("val")
    after = mean_loss(model, val.plain_inputs(), val.data.targets, context.task.total_loss)
    assert after == pytest.approx(min(stopped.losses))
    with torch.inference_mode():
        wanted = model.module.eval()(context.plain_inputs()(torch.arange(len(context.data)))).softmax(1)
    torch.testing.assert_close(own, wanted)


def test_what_comes_out_depends_on_client_and_seed_and_on_no_round(tmp_path: Path) -> None:
    def own(client: int = 2, server_round: int = 1, seed: int = 1) -> torch.Tensor:
        runtime = tiny_runtime(tmp_path, **PARTS, run__seed=seed)
        context = asked(runtime, client, server_round)
        model = context.expert(0, start_vectors("expert.0")["expert.0"])
        fit_own(context, model)
        return model.vector.clone()

    assert torch.equal(own(), own(server_round=7))
    assert not torch.equal(own(), own(client=3))
    assert not torch.equal(own(), own(seed=2))


def test_a_local_model_starts_at_random_and_is_kept_once_it_is_trained(tmp_path: Path) -> None:
    runtime = tiny_runtime(tmp_path, **PARTS)
    start = build(runtime.architecture(0), derive(runtime.config.run.seed, "local", 2))
    model = FlatModel(tail(start, "head"))
    context = asked(runtime, kept=True)
    fit_own(context, model)
    made = local.adapt(context, {})
    assert torch.equal(made.state["model"], model.vector)
    torch.testing.assert_close(
        made.predict(context), model.module(context.plain_inputs()(torch.arange(len(context.data)))).softmax(1).detach()
    )
    context.keep({"model": torch.zeros(50)})
    later = local.adapt(asked(runtime, server_round=2, kept=True), {})
    assert later.state == {}
    assert torch.equal(later.predict(context), torch.full((len(context.data), 10), 0.1))


def test_scores_are_of_the_read_out_that_counts(tmp_path: Path) -> None:
    """As the client's own evaluation counts them, on the same part."""
    runtime, vectors = tiny_runtime(tmp_path, **PARTS), start_vectors("expert.0", "expert.2", "gate")
    for position, reading in enumerate(READINGS):
        if reading.endswith("masked"):
            continue
        job = Job(2, ("expert.0", "expert.2", "gate"), (), {"reading": position})
        context = context_of(runtime, job, 1)
        numbers = scored(as_received)(context, vectors).numbers
        counted: Any = evaluate(context.on("test"), vectors).numbers["right"]
        assert numbers["local"] == [counted[position], len(context.on("test").data)]
        wide: Any = evaluate(context.on("global"), vectors).numbers["right"]
        assert numbers["global"] == [wide[position], 449]


def test_a_site_with_images_of_its_own_has_no_test_images_of_all(tmp_path: Path) -> None:
    runtime = tiny_runtime(tmp_path, **PARTS)
    assert runtime.has_global
    context = context_of(runtime, Job(2, ("expert.0",), (), {"reading": 0}), 1)
    context.on("test")  # from now on its data is at hand
    runtime.own = tmp_path
    assert set(scored(as_received)(context, start_vectors("expert.0")).numbers) == {"local"}


# The server's half ----------------------------------------------------------------------------------------------------


def test_local_asks_nobody_and_sends_nothing() -> None:
    method = tiny_method("local", **PARTS).strategy
    assert method.state() == {}
    assert method.cohort(3) == Cohort((), (), 3)
    assert method.plan(Cohort((), (1, 2), 3), {}) == []
    assert method.serve([7, 8], {}) == {}
    assert method.personal([1, 2], {}) == {1: (), 2: ()}
    assert (method.serves_unseen, method.keeps_state, method.init, method.algorithm) == (False, True, "random", "local")
    assert method.score is PARTICIPANTS_ACCURACY


def test_finetune_is_fedavg_but_for_what_clients_make_of_it() -> None:
    method = tiny_method("finetune", **PARTS).strategy
    assert (method.serves_unseen, method.keeps_state, method.algorithm) == (True, False, "finetune")
    assert method.personal([1, 7], {}) == {1: ("expert.0",), 7: ("expert.0",)}
    assert method.score is PARTICIPANTS_ACCURACY


@pytest.mark.parametrize("method", [Local, FineTune])
@pytest.mark.parametrize("part", ["val", "test"])
def test_both_need_parts_of_their_own(method: type[Local], part: str) -> None:
    config = tiny(strategy__name=method.algorithm, **PARTS | {f"partition__{part}_share": 0.0})
    with pytest.raises(FedjetsError, match=rf"partition.{part}-share = 0: .* '{method.algorithm}' .* 0.2, say"):
        method.validate(config)


def test_finetune_checks_what_fedavg_does() -> None:
    noisy = tiny(
        strategy__name="finetune", privacy__noise_multiplier=1.0, model__norm="batch", moe__trainable="all", **PARTS
    )
    with pytest.raises(FedjetsError, match="privacy.noise-multiplier"):
        FineTune.validate(noisy)

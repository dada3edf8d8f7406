"""What a deployed site lets a run decide, through the real handlers: its paths, its policy, what leaves it."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch
from flwr.app import Context, Message, RecordDict

import strategies
from client_app.app import config_of
from client_app.client import Update
from client_app.local_privacy import Spent, _count
from client_app.policy import THINGS, Noise, Policy, Refused, check_leaving, policy_of
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.privacy import Release, privatised, spent
from fedjets_flwr.models.pretraining import save_common_expert
from fedjets_flwr.runs.audit import AUDIT_LOG
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.audited import told
from tests.support.faults import same_weights
from tests.support.in_process import Finished, InProcessGrid
from tests.support.methods import OF_TEXT, needed
from tests.support.runs import TinyRunner
from tests.support.sites import SiteGrid
from tests.support.tasks import task_folder, task_run, task_settings
from tests.support.text import TextRun, text_folder, text_run, text_settings
from tests.support.tiny import common_expert, tiny

__all__ = ["task_folder", "task_run", "task_settings", "text_folder", "text_run", "text_settings"]

Run = Callable[..., Finished]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return TinyRunner(tmp_path, monkeypatch)


THEIRS: dict[str, Scalar] = {
    "run.output-dir": "/etc", "run.cache-dir": "/root/.ssh", "data.dir": "/home", "common-expert.path": "/etc/passwd",
    "nodes.roster": "/etc/shadow",
}  # fmt: skip


def test_a_deployed_site_takes_no_path_from_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("FEDJETS_CACHE", str(tmp_path / "cache"))
    flat = config_of(Context(1, 1, {"client-id": 3, "data-dir": "/data"}, RecordDict(), THEIRS)).flat()
    assert {key: flat[key] for key in THEIRS} == dict.fromkeys(THEIRS, "") | {"data.dir": "/data"}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    flat = config_of(Context(1, 1, {}, RecordDict(), THEIRS)).flat()
    assert {key: flat[key] for key in THEIRS} == THEIRS


def test_attackers_exist_in_a_simulation_alone(run: Run) -> None:
    attack: dict[str, Scalar] = {"attack__kind": "sign-flip", "attack__share": 1.0, "limits__max_growth": 0.0}
    honest = run("fedjets", SiteGrid, run__rounds=1)
    assert same_weights(run("fedjets", SiteGrid, run__rounds=1, **attack), honest)
    assert not same_weights(run("fedjets", run__rounds=1, **attack), honest)


def with_policies(folder: Path, policies: dict[int, str]) -> type[SiteGrid]:
    """Return a grid some of whose sites have a policy, by client id."""

    class Guarded(SiteGrid):
        def begin(self) -> None:
            for client, text in policies.items():
                (folder / f"policy-{client}.toml").write_text(text)
                self.sites[100 + client].config["policy"] = str(folder / f"policy-{client}.toml")

    return Guarded


def failures_of(finished: Finished) -> dict[int, str]:
    """Return why clients failed, of the last round in which each did."""
    return {int(c): why for record in read_metrics(finished.config.run_dir) for c, why in record["failures"].items()}


EVERYBODY: dict[str, Scalar] = {"cohort__anchors": 3, "cohort__normals": 4, "limits__max_failure_share": 1.0}
REFUSED = {
    0: ("algorithms = ['fedavg', 'scaffold']", "algorithms = fedavg, scaffold; the run has fedjets"),
    1: ("[at-most]\ntrain.local-epochs = 1", "at-most train.local-epochs = 1, the run has 2"),
    2: ("[at-least]\nlimits.min-replies = 3", "at-least limits.min-replies = 3, the run has 1"),
    3: ("most-experts = 1", "most-experts = 1, the message brings 2"),
    4: ("may-leave = ['loss']", "may-leave has no routes, which the reply to query.route holds"),
    5: ("may-leave = ['routes']", "may-leave has no loss, which the reply to train.fedjets holds"),
    6: ("most-megabytes = 0.0001", "most-megabytes = 0.0001, the message brings 0.00"),
    7: ("may-leave = ['routes']", "may-leave has no class-counts, which the reply to evaluate holds"),
}


def test_each_site_refuses_what_its_policy_does_not_allow_and_both_ends_say_which_key(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    finished = run("fedjets", with_policies(tmp_path, {c: text for c, (text, _) in REFUSED.items()}), **EVERYBODY)
    failed = failures_of(finished)
    assert set(failed) == set(REFUSED)
    at_the_sites = [r.message for r in caplog.records if r.module in ("app", "site")]
    for client, (_, why) in REFUSED.items():
        assert f"refused by its policy: {why}" in failed[client]
        assert any(f"refused by its policy: {why}" in line for line in at_the_sites)
    assert not any(r.exc_info for r in caplog.records)


def test_what_a_client_says_of_the_shared_model_is_a_loss() -> None:
    with pytest.raises(Refused, match="may-leave has no loss, which the reply to train.fedavg holds"):
        check_leaving(
            Policy.model_validate({"may-leave": frozenset({"routes"})}),
            "train.fedavg",
            Update(numbers={"validation-loss": 1.0}),
        )


def test_which_model_fits_a_client_best_is_a_route() -> None:
    policy = Policy.model_validate({"may-leave": frozenset({"loss"})})
    check_leaving(policy, "train.ifca", Update(numbers={"loss": 1.0, "num-examples": 3}))
    with pytest.raises(Refused, match="may-leave has no routes, which the reply to train.ifca holds"):
        check_leaving(policy, "train.ifca", Update(numbers={"loss": 1.0, "cluster": 2}))


ALWAYS = {
    "num-examples": "a count of samples",
    "computed": "whether embeddings were in a cache",
    "labelled": "whether anything can be scored here",
    "steps": "of SCAFFOLD's local training: epochs and batches of samples that are counted anyway",
    "evaluate right": "totals of an unseen client's right answers by reading",
    "common-right": "totals of its right answers by control",
    "gate-entropy": "one mean over all of an unseen client's samples",
    "expert": "the update",
    "gate": "the update",
    "trained": "the update, of whichever model the client of IFCA chose",
    "choice": "the update, of whichever expert the client chose",
    "dense": "the update, of what all experts of a language model share",
    "variate": "the update of a control variate",
    "generator": "the update",
}
"""What leaves a site whatever its policy says, and why: by its name without the numbers of experts, clients and places,
or by the message's type and its name."""


def listening() -> tuple[type[InProcessGrid], set[tuple[str, str]]]:
    """Return a grid, and the (message type, name) of every number and vector that its clients reply."""
    heard: set[tuple[str, str]] = set()

    class Listening(InProcessGrid):
        def change(self, reply: Message) -> Message:
            kind, content = reply.metadata.message_type, reply.content
            heard.update((kind, name) for told in content.metric_records.values() for name in told)
            # A client that fails tells nothing: its error is a name that no policy knows.
            heard.update((kind, name) for name in content.config_records if name.startswith("error."))
            for vectors in content.array_records.values():
                heard.update((kind, name.partition(".")[2]) for name in vectors)
            return reply

    return Listening, heard


def kept_back(kind: str, name: str) -> bool:
    """Return whether a policy by which nothing may leave keeps a reply back for what it names so."""
    try:
        check_leaving(Policy.model_validate({"may-leave": frozenset()}), kind, Update(numbers={name: 0}))
    except Refused:
        return True
    return False


def check_every_name(heard: set[tuple[str, str]], *wanted: str) -> None:
    """Assert that a policy keeps back what was heard, or that it stands in ``ALWAYS``; all that is ``wanted`` was."""
    free = {(kind, re.sub(r"(\.\d+)+$", "", name)) for kind, name in heard if not kept_back(kind, name)}
    assert {(kind, name) for kind, name in free if not {name, f"{kind} {name}"} & ALWAYS.keys()} == set()
    assert set(wanted) <= {name for _, name in heard}
    assert not {name for name in THINGS if name in ALWAYS}


SIZES: dict[str, dict[str, Scalar]] = {
    "fedadg": {"moe__trainable": "all", "moe__init": "common", "train__momentum": 0.0},
    "fedmix": {"partition__anchors": 2},
}
EVERYTHING: dict[str, Scalar] = {
    "partition__test_share": 0.2, "partition__samples_per_client": 80, "participants__evaluate_every": 1,
    "run__rounds": 1, "run__evaluate_every": 1, "run__inspect_every": 1, "cohort__normals": 2,
}  # fmt: skip
LISTENED = [name for name in strategies.names() if name not in OF_TEXT]


@pytest.mark.runs
@pytest.mark.parametrize("name", LISTENED)
def test_a_policy_can_keep_back_all_that_replies_of_a_method_name(name: str, run: Run) -> None:
    """A name that a policy does not know leaves every site, so a new one has to be put down here or there."""
    grid, heard = listening()
    run(name, grid, **needed(name) | EVERYTHING | SIZES.get(name, {}))
    check_every_name(heard, "num-examples", "local")


@pytest.mark.runs
def test_a_policy_can_keep_back_what_is_only_told_if_a_run_asks(tmp_path: Path, run: Run) -> None:
    """How sure experts are, mean embeddings, losses of the shared model, and experts that clients choose themselves."""
    save_common_expert(replace(common_expert(), usual_entropy=0.5), tmp_path / "usual.safetensors")
    grid, heard = listening()
    asks: dict[str, Scalar] = {"personalize__read_out": "familiar", "cohort__anchor_selection": "k-means"}
    run("fedjets", grid, common_expert__path=str(tmp_path / "usual.safetensors"), **asks)
    check_every_name(heard, "usual-entropy", "kept-common", "mean-embedding", "experts", "answered", "classes")
    heard.clear()
    run("fedjets", grid, transport__name="shared")
    check_every_name(heard, "experts", "choice.0")
    heard.clear()
    looks: dict[str, Scalar] = {"run__rounds": 3, "early_stopping__check_every": 1, "partition__val_share": 0.2}
    run("fedavg", grid, **EVERYTHING | looks)
    check_every_name(heard, "validation-loss")
    heard.clear()
    run("scaffold", grid, scaffold__option="I", cohort__normals=4, cohort__anchors=3)
    check_every_name(heard, *(f"variate.{client}" for client in range(7)))


@pytest.mark.runs
@pytest.mark.parametrize("name", ["fedavg", "finetune", "local", "scaffold", *OF_TEXT])
def test_a_policy_can_keep_back_all_that_is_told_of_a_text(name: str, text_run: TextRun) -> None:
    """As for images: what is told of a text is told by other names."""
    grid, heard = listening()
    text_run(name, grid, run__rounds=2, **({"train__optimizer": "sgd"} if name == "scaffold" else {}))
    check_every_name(heard, "num-examples", "bits-per-byte", "domain")


@pytest.mark.runs
def test_a_policy_can_keep_back_how_well_a_client_writes(task_run: TextRun) -> None:
    """Scores have names of their own, and so has what tuning makes of a model."""
    grid, heard = listening()
    task_run("fedmoe", grid, run__rounds=1, participants__tuned=True)
    check_every_name(heard, "accuracy", "f1", "exact-match", "rouge-2", "tuned-bits-per-byte", "activation", "used")


def test_what_a_policy_allows_changes_no_bit(tmp_path: Path, run: Run) -> None:
    text = "algorithms = ['fedjets']\nmost-experts = 3\n[at-most]\ntrain.local-epochs = 2\n[at-least]\ntrain.lr = 0.1"
    guarded = run("fedjets", with_policies(tmp_path, {1: text, 8: text}), run__rounds=1)
    assert failures_of(guarded) == {}
    assert same_weights(guarded, run("fedjets", SiteGrid, run__rounds=1))


def test_mean_embeddings_leave_only_where_a_policy_says_so(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    grid = with_policies(tmp_path, {1: "may-leave = ['loss', 'routes']"})
    finished = run("fedjets", grid, cohort__anchor_selection="k-means", run__rounds=1)
    assert 1 not in finished.anchors
    assert "may-leave has no mean-embedding, which the reply to query.prepare holds" in caplog.text


@pytest.mark.parametrize(
    "text, reason",
    [
        ("alogrithms = []", "alogrithms"),
        ("algorithms = ['fedjet']", "algorithms: no fedjet; there are fedadg"),
        ("[at-most]\ntrain.epochs = 3", "train.epochs is no setting that is a number"),
        ("[at-most]\nrun.device = 'cpu'", "run.device"),
        ("[noise]\nclip-norm = 0\nnoise-multiplier = 1", "noise.clip-norm"),
        ("most-experts = ", "cannot be read"),
    ],
)
def test_a_policy_that_cannot_be_read_keeps_the_site_out(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(FedjetsError, match=reason):
        policy_of({"policy": str(tmp_path / "policy.toml")})


NOISE = "[noise]\nclip-norm = 0.5\nnoise-multiplier = 2.0\ndelta = 1e-3"


def test_a_site_clips_its_update_and_noise_of_its_own_is_on_every_number(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """Client 1 is the anchor of expert 1: the same run twice gives other noise, and both ends of it the epsilon."""
    caplog.set_level("INFO", "flwr")
    everybody: dict[str, Scalar] = EVERYBODY | {"run__rounds": 1, "cohort__normals": 0}
    honest = run("fedjets", SiteGrid, **everybody).vectors["expert.1"]
    changed = [run("fedjets", with_policies(tmp_path, {1: NOISE}), **everybody).vectors["expert.1"] for _ in range(2)]
    first, second = (vector - honest for vector in changed)
    assert not torch.equal(*changed)
    # Its own noise of deviation z C = 1 in each, besides what the clipping took, which is the same in both.
    assert float((first - second).std() / math.sqrt(2)) == pytest.approx(1.0, rel=0.5)
    sums = [float(found[1]) for found in re.finditer(r"releases ([0-9.]+), at delta 0.001", caplog.text)]
    assert sums == sorted(sums)
    one = spent([Release(2.0, (1, 1), (1, 0))], {}, 1e-3)["epsilon_normal"]
    assert sums[0] == pytest.approx(one, rel=1e-3)
    assert one < sums[1] < 2 * one


def test_a_site_works_for_its_own_client_alone(run: Run) -> None:
    """Of others it would count no noise, and take samples that this one keeps apart."""

    class Asks(SiteGrid):
        def before(self, message: Message) -> None:
            if message.metadata.message_type.startswith("train"):
                self.sites[101].config["client-id"] = 2

    failed = failures_of(run("fedjets", Asks, **EVERYBODY | {"run__rounds": 1}))
    assert list(failed) == [1]
    assert "client 1 is asked for, and client 2 is here" in failed[1]


def test_noise_is_counted_for_a_site_whichever_client_it_is(tmp_path: Path) -> None:
    noise, config = (
        Noise.model_validate({"clip-norm": 1.0, "noise-multiplier": 4.0, "delta": 1e-3}),
        tiny(run__cache_dir=str(tmp_path)),
    )

    def count(client: int, place: str) -> Spent:
        runtime = SimpleNamespace(own=Path(place))
        return _count(noise, SimpleNamespace(client=client, config=config, runtime=runtime, server_round=1))  # type: ignore[arg-type]

    first, second, elsewhere = count(3, "/images"), count(5, "/images"), count(3, "/others")
    assert (first.releases, second.releases, elsewhere.releases) == (1, 2, 1)
    assert first.epsilon_in_total == elsewhere.epsilon_in_total < second.epsilon_in_total


def test_noise_of_a_site_has_the_deviation_that_its_policy_says() -> None:
    old, far = {"a": torch.zeros(40_000), "b": torch.ones(40_000)}, torch.full((40_000,), 9.0)
    made = privatised({"a": far, "b": 1 + far}, old, clip_norm=3.0, noise_multiplier=0.5)
    changes = torch.cat([made["a"], made["b"] - 1])
    assert float(changes.std()) == pytest.approx(1.5, rel=0.02)
    assert float(changes.mean()) == pytest.approx(3.0 / math.sqrt(80_000), abs=0.02)  # all of the clipped change
    silent = privatised({"a": far, "b": 1 + far}, old, clip_norm=3.0, noise_multiplier=1e-9)
    norm = torch.cat([silent["a"], silent["b"] - 1]).norm()
    assert float(norm) == pytest.approx(3.0, rel=1e-3)
    near = {"a": torch.full((40_000,), 1e-3), "b": old["b"]}
    assert torch.allclose(privatised(near, old, 3.0, 1e-9)["a"], near["a"], atol=1e-6)
    # A key that the generator does not take is drawn only now and then.
    drawn = {float(privatised(near, old, 3.0, 1.0)["a"].sum()) for _ in range(40)}
    assert len(drawn) == 40


def test_noise_refuses_what_it_would_break_or_cannot_cover(tmp_path: Path, run: Run) -> None:
    grid = with_policies(tmp_path, {1: NOISE})
    settings: dict[str, Scalar] = {"run__rounds": 1, "limits__max_failure_share": 1.0}
    variates = run("scaffold", grid, scaffold__option="I", cohort__normals=4, cohort__anchors=3, **settings)
    assert "noise: variate.1 is no change of a vector that was sent" in failures_of(variates)[1]
    whole = run("fedjets", grid, **EVERYBODY | settings | {"moe__trainable": "all", "model__width": 2})
    assert "noise: it would break batch norm's variances" in failures_of(whole)[1]


def test_a_sites_log_says_what_was_asked_told_and_refused_and_is_whole(tmp_path: Path, run: Run) -> None:
    policies = with_policies(tmp_path, {0: NOISE, 1: "may-leave = ['routes']"})

    class Logged(policies):  # type: ignore[valid-type, misc]
        def begin(self) -> None:
            super().begin()
            self.sites[101].config["audit-log"] = str(tmp_path / "elsewhere.jsonl")

    finished = run("fedjets", Logged, **EVERYBODY | {"run__rounds": 1, "cohort__normals": 0})
    own = told(finished.config.cache_dir / "site0" / AUDIT_LOG)
    assert [(line["what"], line["kind"]) for line in own] == [
        ("asked", "query.prepare"), ("answered", "query.prepare"), ("asked", "train.fedjets"),
        ("noise", "train.fedjets"), ("answered", "train.fedjets"),
    ]  # fmt: skip
    asked, noise, answered = own[2:]
    assert asked["clients"] == {"0": ["expert.0", "gate"]}
    assert asked["settings"] == finished.config.identity()
    assert (noise["client"], noise["releases"], noise["delta"]) == (0, 1, 1e-3)
    assert answered["numbers"] == ["loss", "num-examples"]
    vector = finished.vectors["expert.0"]  # of nobody else
    assert answered["vectors"]["expert.0"] == hashlib.sha256(vector.numpy().tobytes()).hexdigest()
    refused = told(tmp_path / "elsewhere.jsonl")
    assert refused[-1]["what"] == "failed"
    assert refused[-1]["reason"] == f"refused by its policy: {REFUSED[5][1]}"
    assert refused[-1]["vectors"] == {}

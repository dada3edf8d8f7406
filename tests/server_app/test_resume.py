"""Runs that are killed, starved or left by their clients, and go on bit by bit."""

import gc
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict

from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.aggregation import weights_hash
from fedjets_flwr.runs.tracking import read_metrics
from tests.support.faults import EIGHT, OneClientANode, Runner, checkpointed, clients_of, failures, same, tampering
from tests.support.in_process import Finished
from tests.support.methods import TRAINED, needed

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """No handler of the run catches it: as SIGKILL, but within this process."""


class Crash(Exception):
    """The run notices it and keeps its last whole round."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("resume"), tmp_path_factory.getbasetemp() / "shared-cache", monkeypatch)


def stopping(error: type[BaseException], kind: str, server_round: int) -> type[OneClientANode]:
    """Return a grid that breaks when the first reply of a kind arrives in a round."""

    class Stopping(OneClientANode):
        def change(self, reply: Message) -> Message:
            if reply.metadata.message_type.startswith(kind) and self.server_round == server_round:
                raise error
            return super().change(reply)

    return Stopping


def stop(run: Runner, error: type[BaseException], kind: str, server_round: int, **settings: Scalar) -> None:
    with pytest.raises(error):
        run(stopping(error, kind, server_round), **settings)
    gc.collect()  # the lock of the run folder goes with the run's objects


def records_of(method: Finished) -> list[dict[str, Any]]:
    """Return the metrics without times, and without bytes: a resumed server sends again what its clients held."""
    return [
        {k: v for k, v in r.items() if k != "seconds" and "bytes" not in k} for r in read_metrics(method.config.run_dir)
    ]


def hash_in(method: Finished) -> str:
    summary = json.loads((method.config.run_dir / "summary.json").read_text())
    assert summary["weights_hash"] == weights_hash(method.vectors)
    return str(summary["weights_hash"])


_unbroken: dict[str, tuple[str, list[dict[str, Any]]]] = {}


def unbroken(run: Runner, name: str) -> tuple[str, list[dict[str, Any]]]:
    if name not in _unbroken:
        method = run(**EIGHT | needed(name))
        _unbroken[name] = hash_in(method), records_of(method)
    return _unbroken[name]


def check_same(run: Runner, name: str, resumed: Finished) -> None:
    digest, records = unbroken(run, name)
    assert hash_in(resumed) == digest
    assert [r["round"] for r in records_of(resumed)] == list(range(1, 9))
    assert records_of(resumed) == records


@pytest.mark.parametrize(
    ("error", "kind", "server_round", "every"),
    [
        pytest.param(Killed, "train", 5, 1, id="killed in round 5"),
        pytest.param(Killed, "train", 6, 3, id="killed in round 6, checkpoints every 3"),
        pytest.param(Crash, "train", 1, 3, id="crashed in round 1"),
        pytest.param(Crash, "evaluate", 8, 3, id="crashed in the last evaluation"),
    ],
)
@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_run_goes_on_bit_by_bit(
    run: Runner, name: str, error: type[BaseException], kind: str, server_round: int, every: int
) -> None:
    own: dict[str, Scalar] = EIGHT | {"run__name": f"{name}-{error.__name__}-{server_round}-{every}"}
    own |= needed(name) | {"run__checkpoint_every": every}
    stop(run, error, kind, server_round, **own)
    left = max(checkpointed(run, str(own["run__name"])), default=0)
    assert left == (server_round - 1 if error is Crash else (server_round - 1) // every * every)
    check_same(run, name, run(run__resume=True, **own))


@pytest.mark.slow
def test_a_run_killed_again_and_again(run: Runner) -> None:
    """In round 5 nobody is asked to choose: its clients were when round 4 was evaluated."""
    own: dict[str, Scalar] = EIGHT | {"run__name": "again", "strategy__name": "fedjets"}
    stops = [("query.prepare", 0), ("query.route", 2), ("train", 2), ("evaluate", 4), ("query.route", 6), ("train", 8)]
    for position, (kind, server_round) in enumerate(stops):
        stop(run, Killed, kind, server_round, run__resume=position > 0, **own)
    check_same(run, "fedjets", run(run__resume=True, **own))


def test_a_finished_run_can_be_resumed(run: Runner) -> None:
    """As a script does that does not know how far the run came."""
    own: dict[str, Scalar] = EIGHT | {"run__name": "finished", "strategy__name": "fedavg"}
    run(**own)
    gc.collect()
    check_same(run, "fedavg", run(run__resume=True, **own))


def test_results_are_not_lost_to_a_resume_that_finds_no_checkpoint(run: Runner) -> None:
    own: dict[str, Scalar] = EIGHT | {"run__name": "thinned", "strategy__name": "fedavg", "run__rounds": 2}
    folder = run(**own).config.run_dir
    gc.collect()
    for path in (folder / "checkpoints").glob("round-*"):
        path.unlink()
    before = (folder / "summary.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(FedjetsError, match="no whole checkpoint to go on from"):
        run(run__resume=True, **own)
    assert ((folder / "summary.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()) == before


@pytest.mark.parametrize("name", ["fedjets", "scaffold"])
def test_a_damaged_newest_checkpoint(run: Runner, name: str) -> None:
    own: dict[str, Scalar] = EIGHT | {"run__name": f"damaged-{name}", "strategy__name": name}
    stop(run, Killed, "train", 6, **own)
    assert checkpointed(run, f"damaged-{name}") == [4, 5]
    damage(run, f"damaged-{name}")
    check_same(run, name, run(run__resume=True, **own))


def damage(run: Runner, name: str) -> None:
    path = max((run.folder / "runs" / name / "checkpoints").glob("round-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_does_not_push_out_good_ones(run: Runner) -> None:
    own: dict[str, Scalar] = EIGHT | {"run__name": "push", "strategy__name": "fedavg", "run__keep_checkpoints": 1}
    stop(run, Killed, "train", 6, **own)
    damage(run, "push")
    stop(run, Killed, "train", 4, run__resume=True, **own)
    assert 3 in checkpointed(run, "push")
    check_same(run, "fedavg", run(run__resume=True, **own))


# Clients that fail ----------------------------------------------------------------------------------------------------


def failing(when: Callable[[int, int], bool]) -> type[OneClientANode]:
    """Return a grid on which a client's training fails when ``when(round, client)`` says so."""

    def tamper(message_type: str, at: int, content: RecordDict) -> str | None:
        hit = message_type.startswith("train") and any(when(at, client) for client in clients_of(content))
        return "the node is gone" if hit else None

    return tampering(tamper)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["fedjets", "scaffold"])
def test_a_round_in_which_all_fail_stops_the_run_and_loses_nothing(run: Runner, name: str) -> None:
    own: dict[str, Scalar] = EIGHT | {"run__name": f"all-{name}", "strategy__name": name, "run__checkpoint_every": 100}
    with pytest.raises(FedjetsError, match=r"round 4: 3 of 3 clients failed.*limits\.max-failure-share.*node is gone"):
        run(failing(lambda server_round, client: server_round == 4), **own)
    gc.collect()
    assert checkpointed(run, f"all-{name}") == [3]
    check_same(run, name, run(run__resume=True, **own))


def test_a_client_that_fails_in_half_of_its_rounds_does_not_stop_the_run(run: Runner) -> None:
    own: dict[str, Scalar] = EIGHT | {"strategy__name": "fedjets", "cohort__anchors": 2}
    found = run(failing(lambda server_round, client: client < 3 and server_round % 2 == 0), **own)
    noted = failures(found)
    assert len(noted) == 8
    assert any(noted)
    for server_round, (record, at) in enumerate(zip(records_of(found), noted, strict=True), start=1):
        expected = {str(c) for c in record["cohort"] if c < 3} if server_round % 2 == 0 else set()
        assert set(at) == expected


def test_the_bound_on_failures_is_a_share_of_the_cohort(run: Runner) -> None:
    """Of 4 clients 2 are not more than a half; 3 are."""
    own: dict[str, Scalar] = EIGHT | {"strategy__name": "fedavg", "cohort__anchors": 1, "cohort__normals": 3}
    cohort = run(**own | {"run__rounds": 1}).rounds.cohort.clients
    two = run(failing(lambda server_round, client: client in cohort[:2]), **own | {"run__rounds": 1})
    assert set(failures(two)[0]) == {str(c) for c in cohort[:2]}
    with pytest.raises(FedjetsError, match="3 of 4 clients failed"):
        run(failing(lambda server_round, client: client in cohort[:3]), **own | {"run__rounds": 1})


@pytest.mark.parametrize("name", TRAINED)
def test_below_the_quorum_all_weights_keep_their_bits(run: Runner, name: str) -> None:
    check_quorum(run, name, "limits__min_replies")


@pytest.mark.parametrize("name", TRAINED)
def test_below_each_experts_quorum_all_weights_keep_their_bits(run: Runner, name: str) -> None:
    check_quorum(run, name, "limits__min_replies_per_expert")


def check_quorum(run: Runner, name: str, limit: str) -> None:
    own: dict[str, Scalar] = EIGHT | needed(name) | {"run__rounds": 2, limit: 10}
    found = run(**own)
    start = found.strategy.state()
    assert all(same(found.vectors[key], start[key]) for key in start)
    assert failures(found) == [{}, {}]


def test_the_quorum_of_an_expert_is_its_own(run: Runner) -> None:
    own: dict[str, Scalar] = EIGHT | {"strategy__name": "fedjets", "run__rounds": 1, "cohort__normals": 3}
    found = run(**own, limits__min_replies_per_expert=2)
    start, (record,) = found.strategy.state(), records_of(found)
    counts = {f"expert.{m}": record["trained"].get(f"expert.{m}", 0) for m in range(5)}
    assert 1 in counts.values()
    assert max(counts.values()) >= 2
    for name, count in counts.items():
        assert same(found.vectors[name], start[name]) == (count < 2)


# A full disk ----------------------------------------------------------------------------------------------------------

FILL = """
    import resource, sys
    from pathlib import Path
    import pytest
    import torch
    from fedjets_flwr.errors import FedjetsError
    from tests.support.faults import EIGHT, OneClientANode, Runner

    class Filling(OneClientANode):
        def change(self, reply):
            if reply.metadata.message_type.startswith("train") and self.server_round == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            return super().change(reply)

    torch.set_num_threads(1)  # as in this process: other threads, other bits
    folder, cache = map(Path, sys.argv[1:])
    runner = Runner(folder, cache, pytest.MonkeyPatch())
    try:
        runner(Filling, **EIGHT | {"run__name": "full", "strategy__name": "fedavg"})
    except (FedjetsError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def filled(run: Runner) -> str:
    """Return what a run says whose files cannot grow beyond 20 kB from round 5 on."""
    command = [sys.executable, "-c", textwrap.dedent(FILL), str(run.folder), str(run.cache)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_full_disk_is_said_in_one_line(filled: str, run: Runner) -> None:
    assert filled.startswith("FedjetsError")
    assert str(run.folder) in filled
    assert not list((run.folder / "runs" / "full" / "checkpoints").glob(".round-*"))


@pytest.mark.slow
def test_after_a_full_disk_the_run_goes_on_from_the_round_before(filled: str, run: Runner) -> None:
    assert "File too large" in filled
    assert checkpointed(run, "full")[-1] == 4
    own: dict[str, Scalar] = EIGHT | {"run__name": "full", "strategy__name": "fedavg", "run__resume": True}
    check_same(run, "fedavg", run(**own))

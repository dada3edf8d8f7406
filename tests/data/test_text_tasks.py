"""Pairs as rows of tokens: who holds which, that nothing is lost or held twice, and labels in unequal shares."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from fedjets_flwr.config.schema import Config
from fedjets_flwr.config.sections import Scalar
from fedjets_flwr.data import text_sources
from fedjets_flwr.data.text import FEDERATED, HELD_OUT, PUBLIC, TEST, split_of
from fedjets_flwr.data.text_sources import Document
from fedjets_flwr.data.text_tasks import Frame, TaskPart, TaskSplit, deal_by_label, open_tasks
from fedjets_flwr.data.text_tokens import NOTHING, tokens_of
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.names import PARTS, VALIDATION, Part
from tests.support.text import spelled

CLIENTS = range(7)
DOCUMENTS = 150
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Settings for two tasks of 150 documents with four pairs each, and clients of all roles."""
    folder = tmp_path_factory.mktemp("pairs")
    for task in ("x", "y"):
        names = [f"{task}{number // 4}" for number in range(4 * DOCUMENTS)]
        lines = [
            {"task": task, "name": name, "input": f"{name}.{number}", "target": "abc"[number % 3]}
            for number, name in enumerate(names)
        ]
        lines.append({**lines[0], "name": "again"})
        path = folder / "data" / f"{task}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, lines)))

    def make(**given: Scalar) -> Config:
        own: dict[str, Scalar] = {
            "data.name": "task-folder", "data.dir": str(folder / "data"), "run.cache-dir": str(folder / "cache"),
            "text.domains": "x,y", "text.scores": "accuracy,f1", "text.tokens": "bytes", "text.train-pairs": 20,
            "text.val-pairs": 10, "text.test-pairs": 6, "text.target-tokens": 4, "language-model.context": 16,
            "partition.clients": 4, "partition.unseen-clients": 2, "partition.validation-clients": 1,
            "cohort.normals": 1, "partition.anchors": 1, "cohort.anchors": 1,
        }  # fmt: skip
        return Config.from_flat(own | spelled(given))

    return make


def shown(split: TaskSplit, part: TaskPart) -> list[tuple[str, str]]:
    """Inputs and targets of a part."""
    found = []
    for read, targets in zip(part.read, part.targets, strict=True):
        begin = int((read == split.frame.begin).nonzero())
        found.append((split.text(read[:begin]), split.text(targets[targets != NOTHING])[1:]))
    return found


def all_parts(split: TaskSplit) -> dict[tuple[int, Part], list[tuple[str, str]]]:
    return {(client, part): shown(split, split.client(client, part)) for client in CLIENTS for part in PARTS}


# Rows ----------------------------------------------------------------------------------------------------------------


def test_a_row_is_an_input_a_sign_a_target_and_an_end() -> None:
    frame = Frame(context=8, most=3, begin=90, end=91)
    assert frame.row(torch.tensor([1, 2]), torch.tensor([7])).tolist() == [1, 2, 90, 7, 91]
    # 8 tokens are read: 4 of an input, the sign, and 3 of a target; what comes after the last is the end.
    assert frame.row(torch.arange(9), torch.arange(50, 59)).tolist() == [0, 1, 7, 8, 90, 50, 51, 52, 91]


def test_targets_alone_are_to_be_told() -> None:
    frame = Frame(context=8, most=3, begin=90, end=91)
    pairs = [([1, 2], [7]), (range(9), range(50, 59))]
    read, targets = frame.windows([frame.row(torch.tensor(list(g)), torch.tensor(list(t))) for g, t in pairs])
    assert read.tolist() == [[1, 2, 90, 7, -1, -1, -1, -1], [0, 1, 7, 8, 90, 50, 51, 52]]
    assert targets.tolist() == [[-1, -1, 7, 91, -1, -1, -1, -1], [-1, -1, -1, -1, 50, 51, 52, 91]]


@given(given=some.integers(1, 30), target=some.integers(1, 30), most=some.integers(1, 10), spare=some.integers(1, 10))
def test_rows_fit_and_lose_no_target_within_its_bound(given: int, target: int, most: int, spare: int) -> None:
    frame = Frame(context=most + 1 + spare, most=most, begin=90, end=91)
    row = frame.row(torch.arange(given), torch.arange(50, 50 + target)).tolist()
    begin = row.index(90)
    assert row[begin + 1 :] == [*range(50, 50 + min(target, most)), 91]
    assert begin == min(given, spare)
    assert row[:begin] == sorted(set(row[:begin]))
    if begin:
        assert row[0] == 0
    if begin > 1:
        assert row[begin - 1] == given - 1
    assert len(row) <= frame.context + 1


# Who holds what ------------------------------------------------------------------------------------------------------


def test_clients_hold_the_tasks_in_turn_and_what_the_settings_say(made: Make) -> None:
    split = open_tasks(made())
    assert split.scores == ("accuracy", "f1")
    assert [split.client(client, "train").domain for client in CLIENTS] == [0, 1, 0, 1, 0, 1, 0]
    assert [len(split.client(3, part).read) for part in PARTS] == [20, 10, 6]
    assert split.vocabulary == 258 > int(split.public.max()) == split.frame.end == split.frame.begin + 1
    assert split.client(0, "train").num_bytes == 2 * 20  # a blank and a letter


def test_no_pair_is_held_twice_and_each_split_is_of_documents_of_its_own(made: Make) -> None:
    config = made()
    split = open_tasks(config)
    held = all_parts(split)
    public, kept = (split_rows(split, stream) for stream in (split.public, split.public_held_out))
    for one, other in combinations([*held.values(), public, kept], 2):
        assert not set(one) & set(other)
    assert len(public) == len(set(public))

    def splits(pairs: list[tuple[str, str]]) -> set[str]:
        return {split_of(Document(given.split(".")[0], "")) for given, _ in pairs}

    assert splits(public) == {PUBLIC}
    assert splits(kept) == {HELD_OUT}
    for (client, part), pairs in held.items():
        scores_the_unseen = part == "test" and config.partition.role_of(client) != VALIDATION
        assert splits(pairs) == {TEST if scores_the_unseen else FEDERATED}
        assert {given[0] for given, _ in pairs} == {"xy"[split.client(client, part).domain]}
        assert all(target == "abc"[int(given.split(".")[1]) % 3] for given, target in pairs)


def split_rows(split: TaskSplit, stream: torch.Tensor) -> list[tuple[str, str]]:
    """Inputs and targets of a stream of rows."""
    ends = (stream == split.frame.end).nonzero()[:, 0] + 1
    rows = stream.tensor_split(ends)[:-1]
    return [(split.text(row[: int((row == split.frame.begin).nonzero())]), split.text(row)[-1]) for row in rows]


def test_windows_of_public_text_begin_where_inputs_do(made: Make) -> None:
    split = open_tasks(made())
    begins, targets = split.public_asked.begins, split.public_asked.targets
    assert int(begins[0]) == 0
    assert (split.public[begins[1:] - 1] == split.frame.end).all()
    assert len(begins) == int((split.public == split.frame.end).sum())
    rows = zip(split_rows(split, split.public), targets.tensor_split(begins[1:]), strict=True)
    assert all(split.text(asked[asked != NOTHING]) == f" {target}" for (_, target), asked in rows)
    assert torch.equal(targets[targets != NOTHING], split.public[targets != NOTHING])


def test_pairs_of_a_document_stay_together(made: Make) -> None:
    split = open_tasks(made())
    held = [
        {given.split(".")[0] for part in ("train", "val") for given, _ in shown(split, split.client(client, part))}
        for client in (0, 2, 4)
    ]
    assert all(len(one & other) <= 1 for one, other in combinations(held, 2))


def test_more_clients_leave_those_that_there_were_as_they_are(made: Make) -> None:
    fewer, more = open_tasks(made()), open_tasks(made(partition__unseen_clients=4))
    for client in range(6):
        for part in PARTS:
            assert torch.equal(fewer.client(client, part).read, more.client(client, part).read)


def test_the_seed_deals_and_public_pairs_stay(made: Make) -> None:
    one, other = open_tasks(made()), open_tasks(made(run__seed=2))
    assert torch.equal(one.public, other.public)
    assert all(not torch.equal(one.client(0, part).read, other.client(0, part).read) for part in PARTS)
    assert one.digest == other.digest
    assert one.digest != open_tasks(made(text__target_tokens=5)).digest


def test_what_became_of_pairs_is_kept_and_the_same(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = made(run__cache_dir=str(tmp_path))
    first = open_tasks(config)
    open_tasks.cache_clear()
    monkeypatch.setattr("fedjets_flwr.data.text_tasks._make", lambda config: pytest.fail("made again"))
    again = open_tasks(config)
    assert first is not again
    assert torch.equal(first.public, again.public)
    assert torch.equal(first.client(1, "val").targets, again.client(1, "val").targets)


# Labels --------------------------------------------------------------------------------------------------------------


def test_labels_are_skewed_where_answers_are_labels(made: Make) -> None:
    plain = open_tasks(made())
    skewed = open_tasks(made(partition__name="dirichlet", partition__alpha=0.05))
    for part in PARTS:  # of a task that is not scored by labels, nothing changes; neither does what scores
        assert torch.equal(plain.client(1, part).read, skewed.client(1, part).read)
    assert torch.equal(plain.client(0, "test").read, skewed.client(0, "test").read)

    def most(split: TaskSplit, client: int, part: Part) -> float:
        labels = Counter(target for _, target in shown(split, split.client(client, part)))
        return labels.most_common(1)[0][1] / labels.total()

    assert all(most(plain, client, "train") < 0.5 for client in (0, 2))
    assert any(most(skewed, client, part) > 0.9 for client in (0, 2) for part in ("train", "val"))
    held = [pair for (client, part), pairs in all_parts(skewed).items() for pair in pairs]
    assert len(held) == len(set(held))


@given(
    labels=some.lists(some.integers(0, 3), min_size=1, max_size=40),
    cut=some.lists(some.integers(0, 40), max_size=4),
    alpha=some.floats(1e-4, 1e4),
    seed=some.integers(0, 99),
)
def test_every_place_is_dealt_once_at_most(labels: list[int], cut: list[int], alpha: float, seed: int) -> None:
    stops = sorted(min(stop, len(labels)) for stop in [*cut, 0])
    sizes = [end - start for start, end in zip(stops, stops[1:], strict=False)]
    dealt = deal_by_label(torch.tensor(labels), sizes, alpha, np.random.default_rng(seed))
    assert [len(places) for places in dealt] == sizes
    places = [place for found in dealt for place in found.tolist()]
    assert len(set(places)) == len(places) <= len(labels)
    by_label = [[place for place in places if labels[place] == label] for label in range(4)]
    assert all(found == sorted(found) for found in by_label)  # the first that is left


def test_shares_are_a_client_s_own_and_as_even_as_alpha_says() -> None:
    labels = torch.arange(4).repeat(1000)

    def shares(alpha: float) -> np.ndarray:
        dealt = deal_by_label(labels, [200] * 5, alpha, np.random.default_rng(1))
        return np.array([torch.bincount(labels[places], minlength=4).numpy() / 200 for places in dealt])

    assert np.abs(shares(1e6) - 0.25).max() < 0.1
    assert (shares(0.01).max(axis=1) > 0.95).all()
    assert len(set(shares(0.01).argmax(axis=1))) > 1


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text__train_pairs": 200}, "the federated part of x has .* lower text.train-pairs, text.val-pairs"),
        ({"text__test_pairs": 40}, "the test part of x has .* lower text.test-pairs"),
        ({"text__scores": "f1"}, "text.scores = 'f1': give one for each of text.domains = 'x,y'"),
        ({"text__domains": "x,z"}, "z.jsonl is not there"),
        (
            {"data__name": "tasks", "text__domains": "code,slang", "text__scores": ""},
            "text.domains: 'slang' has no task; set it to some",
        ),
    ],
)
def test_what_does_not_fit_is_told(given: dict[str, Scalar], said: str, made: Make) -> None:
    with pytest.raises(FedjetsError, match=said):
        open_tasks(made(**given))


def test_too_few_documents_for_a_public_part_are_told(made: Make, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"name": "b", "input": "a", "target": "b"}\n')  # federated
    given: dict[str, Scalar] = {"data__dir": str(tmp_path), "text__domains": "x", "text__scores": "f1"}
    with pytest.raises(FedjetsError, match="no pair is of the public split"):
        open_tasks(made(**given))


def test_a_target_that_fills_the_context_is_refused(made: Make) -> None:
    assert made(text__target_tokens=14)
    with pytest.raises(FedjetsError, match="text.target-tokens = 15: leaves no room .*language-model.context = 16"):
        made(text__target_tokens=15)


def test_python_s_library_and_word_pieces(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = text_sources.library_folder()
    for package in ("json", "logging", "concurrent", "asyncio", "email"):
        shutil.copytree(real / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(text_sources, "library_folder", lambda: tmp_path)
    config = made(
        data__name="tasks", text__scores="", text__domains="code", run__cache_dir=str(tmp_path / "cache"),
        text__tokens="bpe", text__vocabulary=400, text__target_tokens=40, language_model__context=200,
    )  # fmt: skip
    split = open_tasks(config)
    assert split.scores == ("rouge-2",)
    assert split.vocabulary == 402
    pairs = shown(split, split.client(0, "train"))
    assert all(given.startswith(("def ", "async def ")) for given, _ in pairs)
    assert any(target.endswith(".") and given[:4] == "def " for given, target in pairs)


def test_a_task_that_no_client_holds_needs_no_pair_to_score_it(made: Make, tmp_path: Path) -> None:
    """Two clients train on x and y, and one is unseen: z has public pairs alone."""
    folder = Path(str(made().data_dir))
    lines = (folder / "y.jsonl").read_text().splitlines()
    public = [line for line in lines if split_of(Document(json.loads(line)["name"], "")) in (PUBLIC, HELD_OUT)]
    for name, held in (("x", (folder / "x.jsonl").read_text().splitlines()), ("y", lines), ("z", public)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(line.replace('"y', f'"{name}') for line in held))
    few: dict[str, Scalar] = {"partition__clients": 2, "partition__unseen_clients": 1}
    few |= {"partition__validation_clients": 0, "text__domains": "x,y,z", "text__scores": "accuracy,f1,f1"}
    assert len(open_tasks(made(data__dir=str(tmp_path), **few)).client(2, "test").read) == 6


def test_tokens_tell_whether_two_machines_have_the_same(made: Make) -> None:
    pairs: dict[str, Scalar] = {"text__tokens": "bpe", "text__vocabulary": 270}
    split, fewer = open_tasks(made(**pairs)), open_tasks(made(**pairs | {"text__vocabulary": 260}))
    assert tokens_of(split.tokeniser).pieces == tuple(split._pieces)
    assert len({split.digest, fewer.digest, open_tasks(made()).digest}) == 3
    assert open_tasks(made()).tokeniser == ""


def test_scores_are_of_own_files_alone(made: Make) -> None:
    with pytest.raises(FedjetsError, match="text.scores = 'accuracy,f1': is for data.name = 'task-folder'"):
        made(data__name="tasks")

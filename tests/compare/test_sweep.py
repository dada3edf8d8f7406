"""Runs at once: which begins when, and how all of them end."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from types import FunctionType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.compare.sweep import next_run, sweep
from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError

PATIENCE = 20.0
FOLDER = Path("/runs")


def named(name: str, start: str = "") -> Config:
    own = {"run.output-dir": str(FOLDER), "run.name": name}
    return Config.from_flat(own | ({"run.start-from": str(FOLDER / start)} if start else {}))


@given(st.data(), st.integers(1, 4))
def test_every_run_begins_once_in_order_and_after_the_one_that_it_starts_from(data: st.DataObject, most: int) -> None:
    """Whichever ends first; a run passes another only if that one waits."""
    parents = [data.draw(st.integers(-1, at - 1)) for at in range(data.draw(st.integers(1, 8)))]
    waiting = [named(f"r{at}", f"r{parent}" if parent >= 0 else "") for at, parent in enumerate(parents)]
    running: list[Config] = []
    begun, over = list[int](), set[int]()
    while waiting or running:
        while len(running) < most and (config := next_run(waiting, running)):
            at = int(config.run.name[1:])
            assert parents[at] in {-1, *over}
            passed = set(range(at)) - set(begun)
            assert all(parents[other] not in {-1, *over} for other in passed)
            waiting.remove(config)
            running.append(config)
            begun.append(at)
        assert running
        over.add(int(running.pop(data.draw(st.integers(0, len(running) - 1))).run.name[1:]))
    assert sorted(begun) == list(range(len(parents)))
    assert most > 1 or begun == list(range(len(parents)))


class Seen:
    """What a sweep did, in the main thread, and how many runs there were at a time, by its word and in truth."""

    def __init__(self, act: Callable[[Config], object] = lambda config: None) -> None:
        self.begun, self.ended, self.most = list[str](), list[tuple[str, str]](), 0
        self.in_progress = list[int]()
        self.stopped = threading.Event()
        self._act, self._lock, self._now = act, threading.Lock(), 0

    def of(self, runs: Sequence[Config], at_once: int) -> "Seen":
        sweep(runs, at_once, self._run, self._begins, self._ends, self.stopped.set)
        return self

    def _run(self, config: Config) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            self._act(config)
        finally:
            with self._lock:
                self._now -= 1

    def _begins(self, config: Config) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.begun.append(config.run.name)
        self.in_progress.append(len(self.begun) - len(self.ended))

    def _ends(self, config: Config, error: FedjetsError | None) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.ended.append((config.run.name, str(error or "")))


def test_one_at_a_time_goes_by_the_order() -> None:
    seen = Seen().of([named(name) for name in "abcd"], 1)
    assert seen.begun == [*"abcd"]
    assert seen.ended == [(name, "") for name in "abcd"]
    assert seen.most == 1
    assert seen.in_progress == [1] * 4
    assert not seen.stopped.is_set()


def test_so_many_run_at_once_and_no_more() -> None:
    """Each of three waits for the two others."""
    barrier = threading.Barrier(3, timeout=PATIENCE)
    seen = Seen(lambda config: barrier.wait()).of([named(name) for name in "abcdef"], 3)
    assert seen.begun == [*"abcdef"]
    assert sorted(seen.ended) == [(name, "") for name in "abcdef"]
    assert seen.most == max(seen.in_progress) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_waits_for_the_one_that_it_starts_from_and_others_pass_it(fails: bool) -> None:
    others_began = threading.Event()

    def act(config: Config) -> None:
        if config.run.name == "c":
            others_began.set()
        if config.run.name == "a":
            assert others_began.wait(PATIENCE)
            if fails:
                raise FedjetsError("broke")

    seen = Seen(act).of([named("a"), named("b", "a"), named("c"), named("d", "elsewhere")], 2)
    assert [name for name in seen.begun if name != "d"] == ["a", "c", "b"]
    assert sorted(seen.ended) == [("a", "broke" if fails else ""), ("b", ""), ("c", ""), ("d", "")]
    assert not seen.stopped.is_set()


def in_call_of(function: FunctionType, thread: int) -> bool:
    """Return whether a thread is in a call of a function right now."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored, as under nohup
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_stops_all_and_begins_none() -> None:
    """As a signal comes, to the main thread, which waits."""
    main, both = threading.main_thread().ident, threading.Barrier(2, timeout=PATIENCE)
    assert main is not None
    over = list[str]()

    def act(config: Config) -> None:
        if both.wait() == 0:
            while not in_call_of(wait, main):
                time.sleep(0.01)
            signal.pthread_kill(main, signal.SIGINT)
        if seen.stopped.wait(PATIENCE):
            over.append(config.run.name)
            raise KeyboardInterrupt

    seen = Seen(act)
    with pytest.raises(KeyboardInterrupt):
        seen.of([named(name) for name in "abc"], 2)
    assert sorted(over) == ["a", "b"]
    assert seen.begun == ["a", "b"]
    assert seen.ended == []


@pytest.mark.parametrize("wrong", [ValueError("a mistake here"), SystemExit(1)])
def test_what_no_run_should_raise_stops_the_others_too(wrong: BaseException) -> None:
    """Rich exits where a pipe is closed."""

    def act(config: Config) -> None:
        if config.run.name == "b":
            raise wrong
        assert seen.stopped.wait(PATIENCE)

    seen = Seen(act)
    with pytest.raises(type(wrong)):
        seen.of([named(name) for name in "abc"], 2)
    assert seen.begun == ["a", "b"]

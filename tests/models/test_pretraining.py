import threading
from pathlib import Path

from fedjets_flwr.config.schema import Config
from fedjets_flwr.models.pretraining import provide_common_expert

TRAINING, WAITING = "training a common expert", "waiting for the common expert"


def test_runs_that_begin_at_once_train_one_common_expert(tmp_path: Path) -> None:
    """The other run begins while one trains, and waits for it."""
    config = Config.from_flat({"run.cache-dir": str(tmp_path), "common-expert.target-accuracy": 0.1})
    said: dict[str, list[str]] = {"first": [], "other": []}
    digests = set[str]()
    trains, waits = threading.Event(), threading.Event()

    def begin(name: str) -> None:
        def hear(text: str) -> None:
            said[name].append(text)
            if TRAINING in text:
                trains.set()
                assert waits.wait(20)
            if WAITING in text:
                waits.set()

        digests.add(provide_common_expert(config, hear).digest)

    first, other = (threading.Thread(target=begin, args=(name,)) for name in said)
    first.start()
    assert trains.wait(20)
    other.start()
    first.join()
    other.join()
    assert len(digests) == 1
    assert not any(TRAINING in text for text in said["other"])
    assert len(list((tmp_path / "common-experts").iterdir())) == 1

"""Whom to wait for less often."""

from fedjets_flwr.wire.backoff import Backoff


def rests(backoff: Backoff[str], turns: range) -> list[int]:
    """Return the turns in which the site is left alone."""
    return [turn for turn in turns if backoff.resting("site", turn)]


def test_who_stays_silent_is_left_alone_for_1_2_and_4_turns() -> None:
    """A site that is gone for good costs its waiting time ever less often, and others none."""
    backoff = Backoff[str]()
    asked = []
    for turn in range(1, 20):
        if not backoff.resting("site", turn):
            asked.append(turn)
            backoff.silent("site", turn)
    assert asked == [1, 3, 6, 11]
    assert not any(backoff.resting("another", turn) for turn in range(1, 20))


def test_an_answer_ends_the_rest_and_the_next_silence_is_the_first_again() -> None:
    """Silent, answered, silent: a site that is late now and then is not taken for one that is gone."""
    backoff = Backoff[str]()
    backoff.silent("site", 1)
    assert rests(backoff, range(1, 10)) == [1, 2]
    backoff.answered("site")
    assert rests(backoff, range(1, 10)) == []
    backoff.silent("site", 5)
    assert rests(backoff, range(5, 15)) == [5, 6]


def test_an_answer_of_one_says_nothing_of_another() -> None:
    """Sites are late each for its own reason."""
    backoff = Backoff[str]()
    backoff.silent("site", 1)
    backoff.answered("another")
    assert rests(backoff, range(1, 10)) == [1, 2]

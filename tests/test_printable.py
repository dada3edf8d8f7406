from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.printable import LONGEST, one_line, reason


@given(st.text(max_size=2 * LONGEST))
def test_whatever_a_text_holds_it_becomes_one_bounded_printable_line(text: str) -> None:
    shown = one_line(text)
    assert shown.isprintable()
    assert len(shown) <= LONGEST
    assert len(shown.splitlines()) <= 1


def test_ordinary_words_stay_and_what_would_act_on_a_terminal_is_shown() -> None:
    assert one_line("Zürich [bold] 日本: no") == "Zürich [bold] 日本: no"
    assert one_line("a\nINFO: b\r\x1b[2K\u2028\u202e") == r"a\nINFO: b\r\x1b[2K\u2028\u202e"


@given(st.text())
def test_an_error_quotes_what_it_likes_and_moves_no_cursor(text: str) -> None:
    """Names of files, tensors and settings come from outside; its own lines it may have."""
    said = str(FedjetsError(f"a file named {text}"))
    assert said.replace("\n", "").isprintable()
    assert reason(ValueError(text)).isprintable()


def test_an_exception_that_says_nothing_is_named() -> None:
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"  # type: ignore[arg-type]
    assert reason(ValueError("first\nsecond")) == "first"

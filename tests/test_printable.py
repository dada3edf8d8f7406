from hypothesis import given
from hypothesis import strategies as st

from fedjets_flwr.printable import LONGEST, one_line


@given(st.text(max_size=2 * LONGEST))
def test_whatever_a_text_holds_it_becomes_one_bounded_printable_line(text: str) -> None:
    shown = one_line(text)
    assert shown.isprintable()
    assert len(shown) <= LONGEST
    assert len(shown.splitlines()) <= 1


def test_ordinary_words_stay_and_what_would_act_on_a_terminal_is_shown() -> None:
    assert one_line("Zürich [bold] 日本: no") == "Zürich [bold] 日本: no"
    assert one_line("a\nINFO: b\r\x1b[2K\u2028\u202e") == r"a\nINFO: b\r\x1b[2K\u2028\u202e"

"""Words from outside, made fit for a log and a terminal."""

LONGEST = 500
"""Characters of a text from outside; the rest is cut off."""


def printable(text: str) -> str:
    """Return a text whose escape sequences and their like are shown, not obeyed; its lines stay."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return a text as one printable line of at most :data:`LONGEST` characters, line ends shown as well."""
    shown = printable(text[:LONGEST]).replace("\n", "\\n")
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 2]} …"


def reason(error: Exception) -> str:
    """Return what an exception of another library says: its first line, or its name if it says nothing."""
    return one_line(next(iter(str(error).splitlines()), "") or type(error).__name__)

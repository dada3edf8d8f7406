"""Words from outside, made fit for a log and a terminal."""

LONGEST = 500
"""Characters of a text from outside; the rest is cut off."""


def one_line(text: str) -> str:
    """Return a text as one printable line: line ends, escape sequences and their like are shown, not obeyed."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:LONGEST])
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 2]} …"

"""The one exception that is meant for a person."""

from fedjets_flwr.printable import printable


class FedjetsError(Exception):
    """A problem that the user can mend; its text is one line that names the cause and the mend.

    What it quotes of files and messages reaches a terminal, which shows it and obeys none of it.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))

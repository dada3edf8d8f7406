"""SIGTERM and SIGHUP end a command as Ctrl-C does."""

import contextlib
import os
import signal
from pathlib import Path
from types import FrameType


class Interrupts:
    """Has SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; one that is ignored, as by nohup, stays so.

    Attributes:
        number: the first that came; 0 if none did.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.number and number != signal.SIGINT:
            return  # a closed terminal sends several; while the command ends, only another Ctrl-C hurries it
        self.number = self.number or number
        if number == signal.SIGHUP:
            leave_terminal()
        raise KeyboardInterrupt


def leave_terminal() -> None:
    """Have output to a terminal that is gone go nowhere: every last word would be an error."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), stream)

"""What a terminal shows of runs in progress, one or several at once: a bar each; elsewhere lines."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class TimeLeft(TimeRemainingColumn):
    """As rich estimates it by the last half minute, unless the bar's ``left`` says it."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["left"] is None else Text(task.fields["left"])


class Display(Progress):
    """Bars at a terminal, below what is printed meanwhile, and gone after the ``with`` block.

    Where several runs are shown at once, all that one says begins with its name.
    """

    def __init__(self, console: Console, at_once: int = 1) -> None:
        columns = (
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TimeLeft(), TextColumn("{task.fields[facts]}", markup=False),
        )  # fmt: skip
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._named = at_once > 1

    def tell(self, name: str, text: str | Text) -> None:
        """Print what the run of a name says."""
        self.console.print(self.titled(name), text, sep="", soft_wrap=True)

    def titled(self, name: str, text: str = "") -> str:
        """Return a text with the name of its run before it, where there are several."""
        return f"{name}: {text}" if self._named else text

    @contextmanager
    def bar(self, text: str, total: int, done: int = 0, left: str | None = None) -> Iterator[TaskID]:
        """Show a bar during the ``with`` block; yield what names it to :meth:`update`, which may change ``facts``.

        Args:
            text: before it.
            total: its length.
            done: what is done of it already.
            left: words of the time left; None: it is estimated.
        """
        task = self.add_task(text, total=total, completed=done, facts="", left=left)
        try:
            yield task
        finally:
            self.remove_task(task)

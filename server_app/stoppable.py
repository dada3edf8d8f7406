"""A run that can be stopped while it waits for clients."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedjets_flwr.runs.stopping import Parent, Stopped, StopRequest


class StoppableGrid:
    """Flower's grid, but a look for replies ends the run if its launcher asked for that, or is gone."""

    def __init__(self, grid: Grid, request: StopRequest) -> None:
        self._grid, self._request, self._parent = grid, request, Parent()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that came.

        Raises:
            Stopped: the run must end.
        """
        if self._request.made() or self._parent.gone():
            raise Stopped
        return self._grid.pull_messages(message_ids)

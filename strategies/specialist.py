"""A specialist of each client's own beside the generalist of all, with opt-out (Listo Zec et al. 2020).

The server sees FedAvg among those who take part: who opted out is asked for no vector and no embedding, receives the
generalist like everybody else, and tells how its own mixture does on test samples of its own. The early stop of the
generalist (appendix) is that of FedAvg's rounds, ``early-stopping.*``.
"""

from typing import ClassVar

from strategies.base import IMAGES
from strategies.finetune import FineTune


class Specialist(FineTune):
    """FedAvg's rounds; what is scored is each client's mixture, which stays on its disk."""

    algorithm = "specialist"
    learns: ClassVar[tuple[str, ...]] = (IMAGES,)
    keeps_state = True
    tells = ("specialist-share",)


STRATEGY = Specialist

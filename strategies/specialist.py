"""A specialist of each client's own beside the generalist of all, with opt-out (Listo Zec et al. 2020).

The server sees FedAvg among those who take part, and no more: who opted out is never asked for anything, and receives
the generalist like everybody else.
"""

from strategies.finetune import FineTune


class Specialist(FineTune):
    """FedAvg's rounds; what is scored is each client's mixture, which stays with it."""

    algorithm = "specialist"
    keeps_state = True
    tells = ("specialist-share",)


STRATEGY = Specialist

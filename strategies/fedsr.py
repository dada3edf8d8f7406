"""FedSR (Nguyen et al. 2022): one model whose representation is simple, for clients that nobody has seen.

FedJETs' Table 8 compares with it. Started from the common expert, which the bottleneck leaves as it is.
"""

from dataclasses import replace
from typing import ClassVar

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.models.architectures import Architecture
from strategies.base import IMAGES
from strategies.fedavg import FedAvg


class FedSR(FedAvg):
    """FedAvg's rounds with equal weights; clients keep a reference of their own for each class."""

    algorithm = "fedsr"
    learns: ClassVar[tuple[str, ...]] = (IMAGES,)
    keeps_state = True
    equal_weights = True  # as in the authors' code

    @classmethod
    def validate(cls, config: Config) -> None:
        """Only SGD has the momentum that clients may keep; FedL2R's penalty is on features that are trained."""
        super().validate(config)
        if config.moe.trainable == "head" and not config.fedsr.stochastic:
            raise FedjetsError(
                "moe.trainable = 'head': with fedsr.stochastic = false nothing makes the features that fedsr.l2 keeps"
                " small; set it to 'all' or 'stage'"
            )
        if config.fedsr.keep_momentum and config.train.optimizer != "sgd":
            raise FedjetsError(
                f"fedsr.keep-momentum: train.optimizer = {config.train.optimizer!r} has none; set it to 'sgd'"
            )

    def architecture(self, expert: int) -> Architecture:
        """Return the common expert's with a stochastic bottleneck; without one for FedL2R."""
        architecture = super().architecture(expert)
        assert isinstance(architecture, Architecture)
        return replace(architecture, neck="gaussian" if self.config.fedsr.stochastic else "")


STRATEGY = FedSR

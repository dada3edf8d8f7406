"""FedADG (Zhang et al. 2021): one model whose features look alike at all clients, class by class.

FedJETs' Table 8 compares with it. A generator stands for the features of each class; every client keeps a discriminator
of its own, against which its features and the generator learn. No feature leaves a client.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fedjets_flwr.config.schema import Config
from fedjets_flwr.errors import FedjetsError
from fedjets_flwr.federation.cohort import Cohort
from fedjets_flwr.models.expert import gate_inputs
from fedjets_flwr.models.flat_model import FlatModel, VectorSpec
from fedjets_flwr.moe.adversarial import build_generator
from fedjets_flwr.wire.messages import Job
from strategies.base import IMAGES, Routes
from strategies.fedavg import FedAvg


class FedADG(FedAvg):
    """FedAvg's rounds with equal weights, and a generator beside the model; where that is fixed, nobody sends it."""

    algorithm = "fedadg"
    learns: ClassVar[tuple[str, ...]] = (IMAGES,)
    keeps_state = True
    equal_weights = True  # as in the authors' code

    @classmethod
    def validate(cls, config: Config) -> None:
        """There must be a feature extractor to train, and an epoch in which to."""
        super().validate(config)
        if config.fedadg.warm_up_epochs + config.fedadg.epochs == 0:
            raise FedjetsError("fedadg.warm-up-epochs + fedadg.epochs = 0: clients would train nothing; raise one")
        for key, value, usual in (
            ("train.optimizer", config.train.optimizer, "sgd"), ("train.local-steps", config.train.local_steps, 0)
        ):  # fmt: skip
            if value != usual:
                raise FedjetsError(
                    f"{key} = {value!r}: strategy.name = 'fedadg' trains by SGD, epoch by epoch; set it to {usual!r}"
                )
        if config.moe.trainable == "head":
            raise FedjetsError(
                "moe.trainable = 'head': strategy.name = 'fedadg' trains what makes the features; set it to 'all' or"
                " 'stage'"
            )

    @property
    def vectors_moved(self) -> int:
        """The model, and the generator if it is learned."""
        return len(self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("expert.0", "generator") if self.config.fedadg.reference == "learned" else ("expert.0",)

    def state(self) -> dict[str, Tensor]:
        """Return the common expert, and a generator at its random start if it is learned."""
        whole = super().state() | {"generator": self._generator().vector}
        return {name: whole[name] for name in self._names}

    @cached_property
    def specs(self) -> Mapping[str, VectorSpec]:
        """Layouts of the model and the generator."""
        return {**super().specs, "generator": self._generator().spec}

    def _generator(self) -> FlatModel:
        features = gate_inputs(self.common, "penultimate")
        return FlatModel(build_generator(self.config, len(self.task.spec.classes), features))

    def plan(self, cohort: Cohort, routes: Routes) -> list[Job]:
        """Give every client of the cohort the model and the generator."""
        return [Job(c, self._names, self._names, cost=self.num_samples[c]) for c in cohort.clients]


STRATEGY = FedADG

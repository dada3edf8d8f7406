"""FedAvg whose clients fine-tune the global model for themselves (control of Listo Zec et al. 2020, section 4)."""

from fedjets_flwr.config.schema import Config
from fedjets_flwr.data.partition import check_own_parts
from fedjets_flwr.runs.score import PARTICIPANTS_ACCURACY
from strategies.fedavg import FedAvg


class FineTune(FedAvg):
    """FedAvg's rounds; what each client makes of the model by itself is scored on its own test part."""

    algorithm = "finetune"
    score = PARTICIPANTS_ACCURACY

    @classmethod
    def validate(cls, config: Config) -> None:
        """Every client needs samples that stop its training, and samples that score it."""
        super().validate(config)
        check_own_parts(config)


STRATEGY = FineTune

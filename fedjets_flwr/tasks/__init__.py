"""What clients learn: how samples become batches, how far outputs are off, what is counted."""

from fedjets_flwr.config.schema import Config
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.tasks.image_classification import ImageClassification
from fedjets_flwr.tasks.language_modelling import LanguageModelling


def open_task(config: Config) -> Task:
    """Return the task of the settings, with what of its data lies here."""
    return LanguageModelling(config) if config.of_text else ImageClassification(config)

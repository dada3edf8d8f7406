"""What clients learn: how samples become batches, how far outputs are off, what is counted."""

from fedjets_flwr.config.schema import Config
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.tasks.image_classification import ImageClassification
from fedjets_flwr.tasks.language_modelling import LanguageModelling


def open_task(config: Config, common: CommonExpert | None = None, domain: str = "") -> Task:
    """Return the task of the settings, with what of its data lies here.

    Args:
        config: the settings.
        common: the common expert, as soon as there is one: it tells how a site's own text becomes tokens.
        domain: of a deployed site's own text.
    """
    return LanguageModelling(config, common, domain) if config.of_text else ImageClassification(config)

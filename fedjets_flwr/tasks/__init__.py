"""What clients learn: how samples become batches, how far outputs are off, what is counted."""

from collections.abc import Callable, Mapping

from fedjets_flwr.config.schema import Config
from fedjets_flwr.models.common_expert import CommonExpert
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.tasks.image_classification import ImageClassification
from fedjets_flwr.tasks.language_modelling import LanguageModelling
from fedjets_flwr.tasks.text_to_text import TextToText

OF_TEXT: Mapping[str, Callable[[Config, CommonExpert | None, str], Task]] = {
    "text": LanguageModelling,
    "text-folder": LanguageModelling,
    "tasks": lambda config, common, domain: TextToText(config),
    "task-folder": lambda config, common, domain: TextToText(config),
}
"""Tasks on text by ``data.name``; all other samples are images."""


def open_task(config: Config, common: CommonExpert | None = None, domain: str = "") -> Task:
    """Return the task of the settings, with what of its data lies here.

    Args:
        config: the settings.
        common: the common expert, as soon as there is one: it tells how a site's own text becomes tokens.
        domain: of a deployed site's own text.
    """
    made = OF_TEXT.get(config.data.name)
    return ImageClassification(config) if made is None else made(config, common, domain)

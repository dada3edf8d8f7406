"""What clients learn: how samples become batches, how far outputs are off, what is counted."""

from collections.abc import Callable, Mapping

from fedjets_flwr.config.schema import Config
from fedjets_flwr.tasks.base import Task
from fedjets_flwr.tasks.image_classification import ImageClassification
from fedjets_flwr.tasks.language_modelling import LanguageModelling
from fedjets_flwr.tasks.text_to_text import TextToText

OF_TEXT: Mapping[str, Callable[[Config], Task]] = {
    "text": LanguageModelling,
    "text-folder": LanguageModelling,
    "tasks": TextToText,
    "task-folder": TextToText,
}
"""Tasks on text by ``data.name``; all other samples are images."""


def open_task(config: Config) -> Task:
    """Return the task of the settings, with what of its data lies here."""
    return OF_TEXT.get(config.data.name, ImageClassification)(config)

"""Training a language model on public pairs: where its windows begin, and what counts."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from fedjets_flwr.data.text_tasks import open_tasks
from fedjets_flwr.models import language_pretraining
from fedjets_flwr.models.architectures import AnyArchitecture, build
from fedjets_flwr.models.language_pretraining import pretrain_language_model
from tests.support.tasks import Settings, task_folder, task_settings

__all__ = ["task_folder", "task_settings"]


def test_windows_begin_where_pairs_do(task_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = task_settings(language_model__pretrain_steps=3), list[Tensor]()

    def watched(architecture: AnyArchitecture, seed: int) -> nn.Sequential:
        model = build(architecture, seed)
        model.register_forward_pre_hook(lambda module, given: seen.append(given[0]) if module.training else None)
        return model

    monkeypatch.setattr(language_pretraining, "build", watched)
    pretrain_language_model(config, lambda text: None)
    split, context = open_tasks(config), config.language_model.context
    stream = torch.cat([split.public, split.public])
    wanted = {tuple(stream[begin : begin + context].tolist()) for begin in split.public_asked.begins.tolist()}
    read = [tuple(row.tolist()) for batch in seen for row in batch]
    assert len(read) == 3 * config.language_model.pretrain_batch
    assert set(read) <= wanted
    assert len(set(read)) > 10


def test_what_is_asked_for_counts_once_more(task_settings: Settings) -> None:
    """A model that knows nothing yet needs the logarithm of the vocabulary for every token, and again for targets."""
    config, told = task_settings(language_model__pretrain_steps=1), list[str]()
    expert = pretrain_language_model(config, told.append)
    (loss,) = [float(found[1]) for text in told if (found := re.search(r"step 1/1, loss ([\d.]+)", text))]
    assert loss == pytest.approx(2 * math.log(open_tasks(config).vocabulary), rel=0.02)
    assert expert.architecture.num_classes == open_tasks(config).vocabulary

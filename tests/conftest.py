import pytest
import torch
from hypothesis import settings

# Small tensors gain nothing from threads, and lose much where tests share their cores with other work.
torch.set_num_threads(1)

# A deadline would measure the other work.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
settings.register_profile("mutants", deadline=None, max_examples=20)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for item in items:
        if {"run", "text_run"}.intersection(item.fixturenames):
            item.add_marker("runs")

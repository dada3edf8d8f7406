"""Blocks of code in the documents are tests (see ``tests/documents``)."""

import pytest
from sybil.integration.pytest import SybilItem

from tests.documents.blocks import DOCUMENTS

pytest_collect_file = DOCUMENTS.pytest()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark blocks that are slow, lack their data, or are not run."""
    if isinstance(item, SybilItem):
        for mark in item.example.parsed.marks:
            item.add_marker(mark)

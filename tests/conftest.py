"""What every test shares: one thread, no network, and no GPU tests without a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from fewstep.allocator import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()  # as the command line does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The slow ones first: what is short is left to even out what each of two processes has still to do.
    items.sort(key=lambda item: "slow" not in item.keywords)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    """Tests that draw from torch's global stream draw the same numbers in any order of tests."""
    torch.manual_seed(0)

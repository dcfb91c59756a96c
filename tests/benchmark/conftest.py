"""One tiny base for all tests of benchmark and generation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fewstep import lora
from fewstep.backbone import Backbone
from tests.benchmark.fakes import Notes, make_base


@pytest.fixture(scope="session")
def shared_base(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(shared_base: Backbone) -> Iterator[Backbone]:
    """The base without an adapter, before and after."""
    yield shared_base
    lora.detach(shared_base.unet)


@pytest.fixture
def notes() -> Notes:
    return Notes()

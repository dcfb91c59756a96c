"""Bases with a trained-looking adapter on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fewstep.backbone import Backbone, random_backbone
from fewstep.lora import attach, detach, save_adapter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def shake(backbone: Backbone, seed: int = 3) -> None:
    """Give every matrix of the adapter numbers of its own, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.unet.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=random)


@pytest.fixture(scope="module")
def _shared() -> Backbone:
    return random_backbone("tiny", seed=5)


@pytest.fixture
def base(_shared: Backbone) -> Backbone:
    """The base without an adapter."""
    detach(_shared.unet)
    return _shared


@pytest.fixture
def student(base: Backbone) -> Backbone:
    """The base with a rank-4, alpha-32 adapter that does something."""
    attach(base.unet, 4, 32, TARGETS, seed=1)
    shake(base)
    return base


@pytest.fixture
def saved(student: Backbone, tmp_path: Path) -> Path:
    """The folder of that adapter, which stays attached."""
    save_adapter(student.unet, tmp_path / "adapter", student.scheduler_config)
    return tmp_path / "adapter"


@pytest.fixture
def output() -> Callable[[Backbone], torch.Tensor]:
    """What a base, with what is attached to it, says about fixed noise."""
    random = torch.Generator().manual_seed(9)
    x_t, cond = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 77, 32, generator=random)

    def run(backbone: Backbone) -> torch.Tensor:
        with torch.no_grad():
            return backbone.denoiser()(x_t, torch.tensor([999, 259]), cond)

    return run

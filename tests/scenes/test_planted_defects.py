"""The features see what few steps destroy: defects planted in real drawings move their Fréchet distance far."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewstep.metrics.frechet import frechet_distance
from fewstep.scenes.abilities import SCENES
from fewstep.scenes.judge import soften

COUNT = 300
"""Pictures a set: with 64 dimensions enough for a distance of 0 to come out at about 5."""


def drawings(seed: int) -> Tensor:
    pixels = SCENES.reference_pictures(SCENES.prompts(COUNT, 0), 1, seed)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def features(pixels: Tensor) -> Tensor:
    network = SCENES.features()
    return torch.cat([network(some) for some in pixels.split(50)])


def second_sun(pixels: Tensor) -> Tensor:
    """A sun of the drawings' own size and colour, left in one picture and right in the next."""
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    painted = pixels.clone()
    for number in range(len(pixels)):
        disc = (x - (30 if number % 2 else 98)) ** 2 + (y - 20) ** 2 <= 64
        painted[number][:, disc] = torch.tensor([255, 214, 64])[:, None] / 255
    return painted


@pytest.mark.slow
def test_blur_contrast_and_a_second_sun_are_seen() -> None:
    real, others = drawings(1), features(drawings(2))
    untouched = frechet_distance(features(real), others)
    plain, every = torch.zeros(COUNT), torch.ones(COUNT)
    planted = {
        "blur of 1 pixel": soften(real, every, every),
        "contrast down by 10 %": soften(real, plain, 0.9 * every),
        "a second sun": second_sun(real),
    }
    ratios = {name: frechet_distance(features(pixels), others) / untouched for name, pixels in planted.items()}
    assert min(ratios.values()) >= 3, ratios

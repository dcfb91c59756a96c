"""Features of pictures, between which distances are taken: a network of the base's own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Features(Protocol):
    """A named feature extractor."""

    @property
    def name(self) -> str: ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] to features [B, D] on the CPU."""
        ...


class OwnFeatures:
    """The network that a base brings along, wherever it runs: pixels [B, 3, H, W] in 0 ... 1 to [B, D]."""

    name = "the base's own features"

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        place = next(self._network.parameters(), pixels).device
        found: Tensor = self._network((pixels.float() / 255).to(place))
        return found.cpu()

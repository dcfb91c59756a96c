"""Where things stand, as maps that the UNet learns to name on the side while it is trained.

To put a thing where the caption says, words and places have to be multiplied, and at high noise the loss says little
about either. Linear heads on three blocks that have to draw the building, its lit windows, the sun or moon, the birds
and the flowers as coarse maps bring that forward (docs/experiments.md). They are taught by the drawing's own
parameters, trained together with the UNet, and thrown away.
"""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from fewstep.scenes.drawings import numbered_attributes
from fewstep.scenes.layout import SIZE, Layout, sample_layout

CHANNELS = ("building", "lit windows", "light", "birds", "flowers")
CELLS = SIZE // 8
LEVELS = (4, 2, 1)
"""By how much the maps are reduced for the middle block and the two up blocks after it."""

_EDGES = np.arange(CELLS + 1) * (SIZE / CELLS)


def _box(x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Which share of each cell [CELLS, CELLS] a box in pixels covers."""
    x, y = (
        np.clip(np.minimum(_EDGES[1:], high) - np.maximum(_EDGES[:-1], low), 0, None) * CELLS / SIZE
        for low, high in ((x0, x1), (y0, y1))
    )
    return np.outer(y, x)


def landmarks(layout: Layout) -> np.ndarray:
    """The maps of one picture: fp32 [CHANNELS, CELLS, CELLS], the covered share of each cell.

    "lit windows" is the building's map times the share of its windows that are lit.
    """
    maps = np.zeros((len(CHANNELS), CELLS, CELLS), np.float32)
    for building in layout.buildings:
        x, half = building.x, building.half_width
        covered = _box(x - half, building.base - building.height, x + half, building.base)
        maps[0] = np.maximum(maps[0], covered)
        maps[1] = np.maximum(maps[1], covered * np.mean(building.lit))
    for light in layout.lights:
        x, y, radius = light.x, light.y, light.radius
        maps[2] = np.maximum(maps[2], _box(x - radius, y - radius, x + radius, y + radius))
    for x, y, span in layout.birds[np.isfinite(layout.birds[:, 0])]:
        maps[3] = np.maximum(maps[3], _box(x - span, y - 6, x + span, y + 4))
    for x, y, _ in layout.flowers[np.isfinite(layout.flowers[:, 0])]:
        maps[4] = np.maximum(maps[4], _box(x - 6.5, y - 6.5, x + 6.5, y + 8.5))
    return maps


def numbered_landmarks(seed: int, count: int) -> Tensor:
    """The maps of the first `count` drawings of `seed`: fp32 [count, CHANNELS, CELLS, CELLS]."""
    layouts = (
        sample_layout(np.random.default_rng((seed, index, 1)), numbered_attributes(seed, index))
        for index in range(count)
    )
    return torch.from_numpy(np.stack([landmarks(layout) for layout in layouts]))


def standardised_levels(maps: Tensor) -> list[Tensor]:
    """Maps [N, C, 16, 16] reduced to each of `LEVELS`, every channel with mean 0 and std 1: fp16 [N, C, h, w] each."""
    levels = [F.avg_pool2d(maps, level) for level in LEVELS]
    moments = [(level.mean((0, 2, 3), keepdim=True), level.std((0, 2, 3), keepdim=True)) for level in levels]
    return [((level - mean) / (std + 1e-6)).half() for level, (mean, std) in zip(levels, moments, strict=True)]


class LandmarkHeads(nn.Module):
    """A 1×1 convolution on the output of the middle block and of the first two up blocks, each to its level's maps.

    Call `loss` after the UNet's forward, in the same thread. `detach` takes the hooks off the UNet again.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        *_, second, last = unet.config.block_out_channels
        self.heads = nn.ModuleList(nn.Conv2d(width, len(CHANNELS), 1) for width in (last, last, second))
        self._seen = threading.local()  # the parts of a batch run side by side
        blocks = (unet.mid_block, *unet.up_blocks[:2])
        self._hooks = [block.register_forward_hook(partial(self._see, i)) for i, block in enumerate(blocks)]

    def _see(self, index: int, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        setattr(self._seen, f"block{index}", output)

    def loss(self, wanted: list[Tensor], asked: Tensor) -> Tensor:
        """Mean squared error of the maps, summed over the levels.

        Args:
            wanted: standardised maps [B, C, h, w] of each level.
            asked: bool [B]; pictures whose caption was dropped do not count.
        """
        errors = [
            (head(getattr(self._seen, f"block{i}")).float() - maps.float()).square().mean((1, 2, 3)) * asked
            for i, (head, maps) in enumerate(zip(self.heads, wanted, strict=True))
        ]
        return torch.stack(errors).sum(0).mean()

    def detach(self) -> None:
        """Take the hooks off the UNet."""
        for hook in self._hooks:
            hook.remove()

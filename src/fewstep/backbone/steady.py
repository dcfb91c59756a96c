"""A VAE that overflows in half precision, as those of some fine-tuned checkpoints do, is found before it is used."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import CheckpointError
from .base import Backbone

SIDE = 8
"""Side of the latents that it is tried with: numbers overflow at any size."""


def steady_vae(backbone: Backbone, warn: Callable[[str], None]) -> None:
    """Have the VAE run in fp32 where `backbone.dtype` is too narrow for it; everything else stays as it is.

    Raises:
        CheckpointError: it gives numbers that are not finite in fp32 as well.
    """
    if _is_finite(backbone):
        return
    if backbone.dtype != torch.float32:
        backbone.vae.float()
        if _is_finite(backbone):
            precision = str(backbone.dtype).removeprefix("torch.")
            warn(f"the VAE of {backbone.name} overflows in {precision}: it runs in float32, the rest in {precision}")
            return
    raise CheckpointError(
        f"the VAE of {backbone.name} gives numbers that are not finite, in float32 too; allowed is a whole one; fetch "
        "it again, or pass another base"
    )


def _is_finite(backbone: Backbone) -> bool:
    """Of pixels and latents of noise, whose spread is that of pictures."""
    random, side = torch.Generator().manual_seed(0), SIDE * backbone.downscale
    latents = backbone.encode(torch.rand(1, 3, side, side, generator=random) * 2 - 1)
    pixels = backbone.decode(torch.randn(latents.shape, generator=random))
    return bool(latents.isfinite().all()) and bool(pixels.isfinite().all())

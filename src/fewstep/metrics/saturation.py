"""Saturation: the spread of an arm's latents over the teacher's, channel by channel.

Few steps wash pictures out and strong guidance burns them; both show in the standard deviation of the latents long
before they show in an alignment score. 1 is the teacher's, and a good student stays within 5 % of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def latent_moments(latents: Tensor) -> dict[str, Tensor]:
    """First and second moment of each channel of each picture: latents [B, C, H, W] to two of [B, C], fp64."""
    exact = latents.double()
    return {"mean": exact.mean(dim=(2, 3)), "square": exact.square().mean(dim=(2, 3))}


def channel_std(moments: Mapping[str, Tensor]) -> Tensor:
    """Standard deviation [C] of each channel over all pictures and places, from `latent_moments` [N, C]."""
    variance = moments["square"].mean(dim=0) - moments["mean"].mean(dim=0).square()
    return variance.clamp_min(0).sqrt()


def saturation(moments: Mapping[str, Tensor], baseline: Mapping[str, Tensor]) -> tuple[float, ...] | None:
    """`channel_std` over the baseline's, a figure a channel; None where the baseline's latents are constant."""
    spread = channel_std(baseline)
    if not bool((spread > 0).all()):
        return None
    return tuple((channel_std(moments) / spread).tolist())

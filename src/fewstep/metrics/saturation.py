"""Saturation: the spread of an arm's latents over the teacher's, channel by channel.

Few steps wash pictures out and strong guidance burns them; both show in the standard deviation of the latents long
before they show in an alignment score. 1 is the teacher's, and a good student stays within 5 % of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewstep.metrics.halves import half_samples, with_spread
from fewstep.records import Interval


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


def mean_saturation(
    moments: Mapping[str, Tensor], baseline: Mapping[str, Tensor], prompts: Sequence[int]
) -> Interval | None:
    """`saturation`, mean over channels, with its interval by half-sampling prompts; None where there is none.

    Args:
        prompts: of the N pictures of both, the same in both.
    """
    whole = saturation(moments, baseline)
    if whole is None:
        return None
    drawn, means = torch.tensor(list(prompts)), list[float]()
    for half in half_samples(prompts):
        rows = torch.isin(drawn, torch.tensor(sorted(half)))
        found = saturation(*({name: one[rows] for name, one in side.items()} for side in (moments, baseline)))
        if found is None:
            return Interval(value=sum(whole) / len(whole))
        means.append(sum(found) / len(found))
    return with_spread(sum(whole) / len(whole), means, prompts, least=0.0)

"""Fréchet distance between two sets of pictures, over features that the base brings along (Heusel et al. 2017).

    d(a, b) = |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

It is biased upwards by small sets, the more so the more dimensions: compare figures at equal N alone, with real against
real at that N beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fewstep.records import Interval

HALVES = 100
"""Half-samples behind a standard error: known to about 7 %."""


class _Features(nn.Module):
    """torchmetrics takes pictures through a module: ours are features already."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Distance between features [N, D] and [M, D], by torchmetrics, in fp64 on the CPU; at least two of each."""
    if features.dim() != 2 or reference.dim() != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(features.shape)} and {tuple(reference.shape)}; allowed: [N, D], [M, D]"
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"{len(features)} and {len(reference)} pictures; allowed are at least two of each")
    metric = FrechetInceptionDistance(feature=_Features(features.shape[1]))
    metric.update(reference.detach().double().cpu(), real=True)
    metric.update(features.detach().double().cpu(), real=False)
    # Rounding alone takes the distance of a set to itself below zero.
    return max(0.0, float(metric.compute()))


def half_samples(prompts: Sequence[int], *, halves: int = HALVES, seed: int = 0) -> list[frozenset[int]]:
    """Random halves of the distinct prompts, to be used for every arm alike; none where there are under four."""
    distinct = np.unique(np.asarray(prompts))
    if len(distinct) < 4:
        return []
    rng = np.random.default_rng(seed)
    return [frozenset(rng.choice(distinct, size=len(distinct) // 2, replace=False).tolist()) for _ in range(halves)]


def half_sample_distances(
    features: Tensor,
    prompts: Sequence[int],
    reference: Tensor,
    reference_prompts: Sequence[int],
    halves: Sequence[frozenset[int]],
) -> list[float]:
    """The distance within each half: both sides are restricted to its prompts. Empty where a half has too few."""
    drawn, real = torch.tensor(list(prompts)), torch.tensor(list(reference_prompts))
    distances = []
    for half in halves:
        chosen = torch.tensor(sorted(half))
        mine, theirs = features[torch.isin(drawn, chosen)], reference[torch.isin(real, chosen)]
        if min(len(mine), len(theirs)) < 2:
            return []
        distances.append(frechet_distance(mine, theirs))
    return distances


def with_spread(value: float, distances: Sequence[float]) -> Interval:
    """A distance (or a difference of two) with the interval that its half-samples give.

    A half of the prompts, drawn without replacement, varies around the whole as the whole varies around the truth
    (Politis and Romano 1994: (1 - 1/2) / (n/2) = 1/n), so their spread is the standard error. Resampling *with*
    replacement would count pictures twice, which shrinks covariances and shifts the distance.
    """
    if len(distances) < 2:
        return Interval(value=value)
    error = float(np.std(distances, ddof=1))
    return Interval(
        value=value,
        low=value - 1.96 * error,
        high=value + 1.96 * error,
        standard_error=error,
        method="half-sampling of prompts",
    )

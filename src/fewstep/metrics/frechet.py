"""Fréchet distance between two sets of pictures, over features that the base brings along (Heusel et al. 2017).

    d(a, b) = |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

It is biased upwards by small sets, the more so the more dimensions: compare figures at equal N alone, with real against
real at that N beside them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


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
    # Not over processes: whoever asks has all features, and the others may not be asking.
    metric = FrechetInceptionDistance(feature=_Features(features.shape[1]), sync_on_compute=False)
    metric.update(reference.detach().double().cpu(), real=True)
    metric.update(features.detach().double().cpu(), real=False)
    # Rounding alone takes the distance of a set to itself below zero.
    return max(0.0, float(metric.compute()))

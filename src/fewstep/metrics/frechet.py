"""Fréchet distance between two sets of pictures, over whichever features these are (Heusel et al. 2017).

    d(a, b) = |mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

With cov = RᵀR, the trace of the root is the sum of the singular values of R_a R_bᵀ: torchmetrics' figure, without the
rounding of its general eigenvalues where there are fewer pictures than dimensions, and so much faster that a hundred
half-samples of 2048 dimensions can be had.

It is biased upwards by small sets, the more so the more dimensions: compare figures at equal N alone, with real against
real at that N beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Distance between features [N, D] and [M, D], in fp64 on the CPU; at least two of each."""
    if features.dim() != 2 or reference.dim() != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(features.shape)} and {tuple(reference.shape)}; allowed: [N, D], [M, D]"
        )
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"{len(features)} and {len(reference)} pictures; allowed are at least two of each")
    a, b = features.detach().double().cpu(), reference.detach().double().cpu()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    traces = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    # Rounding alone takes the distance of a set to itself below zero.
    return max(0.0, float((a.mean(0) - b.mean(0)).square().sum() + traces))


def _covariance_root(features: Tensor) -> Tensor:
    """R [min(N, D), D] with RᵀR the covariance of features [N, D]."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred

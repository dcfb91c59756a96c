"""Kernel distances between two sets of pictures: KID and CMMD, both the unbiased estimate of one squared MMD.

    MMD²(a, b) = mean_{i≠j} k(a_i, a_j) + mean_{i≠j} k(b_i, b_j) − 2 mean_{i,j} k(a_i, b_j)

as Gretton et al. (2012, eq. 3) have it, with the kernels

    KID    k(x, y) = (x·y / D + 1)³                  over the features of a picture (Bińkowski et al. 2018)
    CMMD   k(x, y) = exp(−‖x − y‖² / 2σ²), σ = 10     over unit embeddings of CLIP's pictures (Jayasumana et al. 2024)

Unlike the Fréchet distance, neither grows when there are few pictures; both may come out slightly below zero. They use
all pairs, where torchmetrics averages over random subsets: the same expectation, less noise, no randomness.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
"""CMMD is reported times a thousand, as by its authors."""

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Two sets [N, D] and [M, D] to the kernel of every pair, [N, M]."""


def polynomial(a: Tensor, b: Tensor) -> Tensor:
    """(x·y / D + 1)³, [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(−‖x − y‖² / 2σ²) with CMMD's σ, [N, M]."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T
    return torch.exp(-squares.clamp_min(0) / (2 * CMMD_SIGMA**2))


def squared_mmd(a: Tensor, b: Tensor, kernel: Kernel) -> float:
    """The unbiased estimate over features [N, D] and [M, D], in fp64; at least two of each."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}; allowed: [N, D], [M, D], N, M > 1")
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    within = sum(_mean_of_others(kernel(x, x)) for x in (a, b))
    return float(within - 2 * kernel(a, b).mean())


def _mean_of_others(pairs: Tensor) -> Tensor:
    """The mean of a square [N, N] without its diagonal."""
    return (pairs.sum() - pairs.diagonal().sum()) / (len(pairs) * (len(pairs) - 1))


def kid(features: Tensor, reference: Tensor) -> float:
    """Kernel inception distance, over whichever features these are."""
    return squared_mmd(features, reference, polynomial)


def cmmd(embeddings: Tensor, reference: Tensor) -> float:
    """CLIP maximum mean discrepancy × 1000, over embeddings that are brought to unit length."""
    a, b = (torch.nn.functional.normalize(one.double(), dim=1) for one in (embeddings, reference))
    return CMMD_SCALE * squared_mmd(a, b, gaussian)

"""Precision and recall of a set of pictures (Kynkäänniemi et al. 2019), over features.

A set's manifold is the union of balls around its pictures, each out to the k-th nearest other picture of the set.

    precision   the share of drawn pictures inside the real manifold: does each look real?
    recall      the share of real pictures inside the drawn manifold: is everything drawn that there is?

Both depend on the numbers of pictures, the more so the more dimensions: compare at equal N, with real against real
beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.metrics.kernels import BLOCK

NEIGHBOURS = 3
"""k of the paper."""


def precision_recall(
    features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Precision and recall of features [N, D] against a reference [M, D]; each set must have more than k pictures."""
    if min(len(features), len(reference)) <= neighbours:
        raise ValueError(f"{len(features)} and {len(reference)} pictures; allowed are more than {neighbours} of each")
    drawn, real = features.detach().double().cpu(), reference.detach().double().cpu()
    return _inside(drawn, real, neighbours, block), _inside(real, drawn, neighbours, block)


def _inside(points: Tensor, manifold: Tensor, neighbours: int, block: int) -> float:
    """Share of `points` within the reach of at least one picture of `manifold`."""
    # The nearest of all is the picture itself.
    reaches = [torch.cdist(some, manifold).kthvalue(neighbours + 1, dim=1).values for some in manifold.split(block)]
    reach = torch.cat(reaches)
    inside = [(torch.cdist(some, manifold) <= reach).any(dim=1) for some in points.split(block)]
    return float(torch.cat(inside).double().mean())

"""Diversity and faithfulness: how far pictures lie from one another, and from the teacher's of the same noise.

A student that collapses draws nearly the same picture for every noise, which no score of single pictures shows. One
that is faithful draws what the teacher would have drawn from that noise; one that is not may still be good.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.metrics.kernels import BLOCK


def diversity(features: Tensor, prompts: Sequence[int], block: int = BLOCK) -> Tensor:
    """Mean Euclidean distance of each picture to the others of its prompt, [N] fp64; NaN for a prompt's only picture.

    Args:
        features: [N, D].
        prompts: [N], the prompt of each picture.
        block: pictures whose distances to the others are held at once.
    """
    exact, owner = features.detach().double().cpu(), torch.tensor(list(prompts))
    found = torch.empty(len(exact), dtype=torch.float64)
    for same in owner.argsort(stable=True).split(owner.unique(return_counts=True)[1].tolist()):
        for rows in same.split(block):
            found[rows] = torch.cdist(exact[rows], exact[same]).sum(1) / (len(same) - 1)
    return found


def paired_distance(features: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of each picture to its counterpart, [N] fp64, for features [N, D] and [N, D]."""
    if features.shape != others.shape:
        raise ValueError(
            f"features of shapes {tuple(features.shape)} and {tuple(others.shape)}; allowed are equal ones"
        )
    return (features.detach().double().cpu() - others.detach().double().cpu()).norm(dim=1)

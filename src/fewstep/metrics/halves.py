"""Intervals of distances between sets of pictures, by half-sampling prompts.

A half of the prompts, drawn without replacement, varies around the whole as the whole varies around the truth (Politis
and Romano 1994: (1 - 1/2) / (n/2) = 1/n), so the spread of its distance is the standard error; of an odd number n the
smaller half m = (n - 1) / 2 varies by (1 - m/n) / m, and its spread is scaled to 1/n. Resampling *with*
replacement would count pictures twice, which shrinks covariances, puts neighbours at distance 0 and shifts the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fewstep.metrics.intervals import LEVEL, student_t
from fewstep.records import Interval

HALVES = 100
"""Half-samples behind a standard error: known to about 7 %."""

Found = TypeVar("Found")
"""What is measured between two sets: a number, or several at once."""


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
    distance: Callable[[Tensor, Tensor], Found],
    least: int = 2,
) -> list[Found]:
    """What `distance` finds between features [N, D] and [M, D] within each half: both sides are restricted to its
    prompts.

    Empty where a half has fewer pictures than the `least` that the distance takes.
    """
    return within_halves(
        prompts, reference_prompts, halves, lambda mine, theirs: distance(features[mine], reference[theirs]), least
    )


def within_halves(
    prompts: Sequence[int],
    reference_prompts: Sequence[int],
    halves: Sequence[frozenset[int]],
    find: Callable[[Tensor, Tensor], Found],
    least: int = 2,
) -> list[Found]:
    """What `find` finds of the pictures of each half, told which of either side these are: masks [N] and [M]."""
    drawn, real = torch.tensor(list(prompts)), torch.tensor(list(reference_prompts))
    found = dict[frozenset[int], Found]()  # of few prompts there are few halves, and each comes many times
    for half in set(halves):
        chosen = torch.tensor(sorted(half))
        mine, theirs = torch.isin(drawn, chosen), torch.isin(real, chosen)
        if min(int(mine.sum()), int(theirs.sum())) < least:
            return []
        found[half] = find(mine, theirs)
    return [found[half] for half in halves]


def with_spread(
    value: float,
    distances: Sequence[float],
    prompts: Sequence[int],
    *,
    least: float = -math.inf,
    most: float = math.inf,
) -> Interval:
    """A distance (or a difference of two) with the interval that its half-samples give, by Student's t.

    Args:
        distances: in the half-samples.
        prompts: which they are halves of, in any number of pictures each.
        least, most: between which it must lie.
    """
    if len(distances) < 2:
        return Interval(value=value)
    count = len(set(prompts))
    half = count // 2
    error = float(np.std(distances, ddof=1)) * math.sqrt(half / (count - half))
    reach = error * student_t((1 + LEVEL) / 2, count - 1)
    return Interval(
        value=value,
        low=max(least, value - reach),
        high=min(most, value + reach),
        standard_error=error,
        method="half-sampling of prompts",
    )

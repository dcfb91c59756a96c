"""How much of the teacher's alignment an arm keeps, both ways.

A cosine has a floor: a picture scored against someone else's caption does not score 0, so that a ratio of raw cosines
flatters a broken student. The honest ratio takes the floor off both: (score - floor) / (teacher - teacher's floor),
each floor measured on that arm's own pictures with shuffled captions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.metrics.intervals import bootstrap
from fewstep.records import Interval


def retention(scores: ArrayLike, baseline: ArrayLike, clusters: Sequence[int], *, seed: int = 0) -> Interval | None:
    """Mean score over the baseline's, [N] each; None where the baseline's mean is not above 0."""
    return _ratio(np.asarray(scores, np.float64), np.asarray(baseline, np.float64), clusters, seed)


def corrected_retention(
    scores: ArrayLike,
    floors: ArrayLike,
    baseline: ArrayLike,
    baseline_floors: ArrayLike,
    clusters: Sequence[int],
    *,
    seed: int = 0,
) -> Interval | None:
    """`retention` with each picture's floor taken off; None where the baseline does not rise above its own floor."""
    return _ratio(
        np.asarray(scores, np.float64) - np.asarray(floors, np.float64),
        np.asarray(baseline, np.float64) - np.asarray(baseline_floors, np.float64),
        clusters,
        seed,
    )


def _ratio(
    lift: NDArray[np.float64], baseline: NDArray[np.float64], clusters: Sequence[int], seed: int
) -> Interval | None:
    if baseline.mean() <= 0:
        return None

    def of(means: NDArray[np.float64]) -> NDArray[np.float64]:
        # A resample whose baseline is at its floor has no ratio: NaN, and the whole interval is left open.
        return means[:, 0] / np.where(means[:, 1] > 0, means[:, 1], np.nan)

    return bootstrap(np.stack([lift, baseline], axis=1), clusters, of, seed=seed)

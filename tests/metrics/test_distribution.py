"""Kernel distances, precision and recall, diversity and faithfulness where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from fewstep.metrics.kernels import cmmd, gaussian, kid, polynomial, squared_mmd
from fewstep.metrics.manifold import precision_recall
from fewstep.metrics.variety import diversity, paired_distance


def normal(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kid_is_torchmetrics_over_all_pairs() -> None:
    a, b = normal(60, 8), normal(60, 8, 1) * 1.3 + 0.2
    assert kid(a, b) == pytest.approx(poly_mmd(b, a).item(), rel=1e-9)


@pytest.mark.parametrize("kernel", [polynomial, gaussian])
def test_the_sum_over_pairs_one_by_one(kernel: object) -> None:
    a, b = normal(5, 3), normal(7, 3, 1)

    def k(x: Tensor, y: Tensor) -> float:
        return float(kernel(x[None], y[None]))  # type: ignore[operator]

    within = sum(np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (a, b))
    expected = within - 2 * np.mean([k(x, y) for x in a for y in b])
    assert squared_mmd(a, b, kernel) == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]


def test_neither_grows_when_there_are_few_pictures() -> None:
    """Unbiased: over many small sets of the same distribution the mean is 0, within its own error."""
    for distance in (kid, cmmd):
        found = np.array([distance(normal(20, 4, 2 * i), normal(30, 4, 2 * i + 1)) for i in range(200)])
        assert abs(found.mean()) < 3 * found.std() / math.sqrt(len(found))
        assert found.min() < 0


def test_cmmd_in_closed_form() -> None:
    """Two points against two: unit vectors at right angles are √2 apart, those of one direction 0."""
    a, b = torch.tensor([[1.0, 0], [2.0, 0]]), torch.tensor([[0, 3.0], [0, 1.0]])
    assert cmmd(a, b) == pytest.approx(1000 * (1 + 1 - 2 * math.exp(-2 / 200)), rel=1e-6)


def test_precision_and_recall_of_known_sets() -> None:
    real = torch.arange(10.0)[:, None]
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 1000, real) == (0.0, 0.0)
    # Only the lower half is drawn: all of it looks real; of the ten real ones 0 … 4 are covered, and with reaches of
    # two to four 5 … 8 as well, for 4 reaches back to 1, three away, and forward as far, and so on.
    some = real[:5]
    precision, recall = precision_recall(some, real)
    assert precision == 1.0
    reaches = {0: 3, 1: 2, 2: 2, 3: 2, 4: 3}
    assert recall == np.mean([any(abs(x - y) <= reach for y, reach in reaches.items()) for x in range(10)])


def test_collapse_costs_recall_and_noise_costs_precision() -> None:
    real = normal(400, 4)
    collapsed, noisy = normal(400, 4, 1) * 0.2, normal(400, 4, 2) * 3
    assert precision_recall(collapsed, real)[0] > 0.95 and precision_recall(collapsed, real)[1] < 0.2
    assert precision_recall(noisy, real)[0] < 0.6 and precision_recall(noisy, real)[1] > 0.8


def test_too_few_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(normal(3, 2), normal(9, 2))
    with pytest.raises(ValueError, match="N, M > 1"):
        kid(normal(1, 2), normal(9, 2))


def test_diversity_is_within_a_prompt() -> None:
    features = torch.tensor([[0.0, 0], [3, 4], [100, 0], [100, 0], [7, 7]])
    found = diversity(features, [0, 0, 1, 1, 2])
    assert found[:4].tolist() == [5, 5, 0, 0]
    assert found[4].isnan()


def test_faithfulness_is_to_the_counterpart() -> None:
    assert paired_distance(torch.tensor([[0.0, 0], [1, 1]]), torch.tensor([[3.0, 4], [1, 1]])).tolist() == [5, 0]
    with pytest.raises(ValueError, match="equal"):
        paired_distance(normal(2, 2), normal(3, 2))

"""Kernel distances, precision and recall, diversity and faithfulness where the answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from fewstep.metrics.halves import within_halves
from fewstep.metrics.kernels import Kernel, cmmd, gaussian, kid, polynomial, squared_mmd
from fewstep.metrics.manifold import precision_recall
from fewstep.metrics.variety import diversity, paired_distance


def normal(count: int, dimensions: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_kid_is_torchmetrics_over_all_pairs() -> None:
    """Where each picture has a prompt that no other has, of either set."""
    a, b = normal(60, 8), normal(60, 8, 1) * 1.3 + 0.2
    assert kid(a, b, range(60), range(60, 120)) == pytest.approx(poly_mmd(b, a).item(), rel=1e-9)


@pytest.mark.parametrize("kernel", [polynomial, gaussian])
def test_the_mean_over_pairs_of_different_prompts_one_by_one(kernel: Kernel) -> None:
    a, b = (normal(5, 3), [0, 0, 1, 2, 2]), (normal(7, 3, 1), [2, 0, 0, 1, 1, 1, 0])

    def mean(x: tuple[Tensor, list[int]], y: tuple[Tensor, list[int]]) -> float:
        pairs = [(v[None], w[None]) for v, i in zip(*x, strict=True) for w, j in zip(*y, strict=True) if i != j]
        return float(np.mean([float(kernel(v, w)) for v, w in pairs]))

    expected = mean(a, a) + mean(b, b) - 2 * mean(a, b)
    for block in (2, 512):
        assert squared_mmd(a[0], b[0], kernel, a[1], b[1], block) == pytest.approx(expected, rel=1e-9)


def test_one_picture_of_each_prompt_is_the_estimate_for_pairs() -> None:
    """Gretton et al. (2012), eq. 4: the mean of h(z_i, z_j) over i ≠ j, with z_i the pictures of prompt i."""
    a, b = normal(9, 3), normal(9, 3, 1)
    h = gaussian(a, a) + gaussian(b, b) - gaussian(a, b) - gaussian(b, a)
    expected = float((h.sum() - h.diagonal().sum()) / (9 * 8))
    assert squared_mmd(a, b, gaussian, range(9), range(9)) == pytest.approx(expected, rel=1e-9)


def test_a_set_against_itself_is_nothing() -> None:
    features, prompts = normal(45, 6), [number // 3 for number in range(45)]
    for kernel in (polynomial, gaussian):
        for block in (7, 512):
            assert squared_mmd(features, features.clone(), kernel, prompts, prompts, block) == 0


def naive(a: Tensor, b: Tensor, kernel: Kernel) -> float:
    """The estimate for independent sets: all pairs but those of a picture with itself."""

    def others(x: Tensor) -> Tensor:
        pairs = kernel(x, x)
        return (pairs.sum() - pairs.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(others(a) + others(b) - 2 * kernel(a, b).mean())


@pytest.mark.parametrize(
    ("prompts", "mine", "theirs", "shared"),
    [(12, 4, 4, 0.0), (12, 4, 7, 0.0), (12, 4, 4, 0.9), (12, 1, 1, 0.9)],
    ids=["captions", "unequal numbers", "captions and noise", "a picture each"],
)
@pytest.mark.parametrize("kernel", [polynomial, gaussian])
def test_sets_that_share_prompts_and_nothing_else_are_no_distance_apart(
    kernel: Kernel, prompts: int, mine: int, theirs: int, shared: float
) -> None:
    """Over many pairs of sets of one distribution the mean is 0, within its own error; the naive one lies far below."""
    draw, found, naively = torch.Generator().manual_seed(0), list[float](), list[float]()
    numbers = [[prompt for prompt in range(prompts) for _ in range(each)] for each in (mine, theirs)]
    for _ in range(200):
        subject = torch.randn(prompts, 1, 4, generator=draw, dtype=torch.float64)
        noise, other = torch.randn(2, prompts, max(mine, theirs), 4, generator=draw, dtype=torch.float64)
        a = subject + 0.5 * noise[:, :mine]
        b = subject + 0.5 * (shared * noise + math.sqrt(1 - shared**2) * other)[:, :theirs]
        sets = a.flatten(0, 1), b.flatten(0, 1)
        found.append(squared_mmd(*sets, kernel, *numbers))
        naively.append(naive(*sets, kernel))
    error, naive_error = (np.std(one) / math.sqrt(len(one)) for one in (found, naively))
    assert abs(np.mean(found)) < 3 * error
    assert np.mean(naively) < -10 * naive_error


def test_neither_grows_when_there_are_few_pictures() -> None:
    """Unbiased also for independent sets."""
    for distance in (kid, cmmd):
        drawn = [(normal(20, 4, 2 * i), normal(30, 4, 2 * i + 1)) for i in range(200)]
        found = np.array([distance(a, b, range(20), range(20, 50)) for a, b in drawn])
        assert abs(found.mean()) < 3 * found.std() / math.sqrt(len(found))
        assert found.min() < 0


def test_cmmd_in_closed_form() -> None:
    """Two points against two: unit vectors at right angles are √2 apart, those of one direction 0."""
    a, b = torch.tensor([[1.0, 0], [2.0, 0]]), torch.tensor([[0, 3.0], [0, 1.0]])
    for prompts in ([0, 1], [2, 3]):
        assert cmmd(a, b, [0, 1], prompts) == pytest.approx(1000 * (1 + 1 - 2 * math.exp(-2 / 200)), rel=1e-6)


def test_the_pictures_of_a_half_keep_their_prompts() -> None:
    a, b, prompts = normal(12, 3), normal(8, 3, 1), torch.arange(4)
    of_a, of_b = prompts.repeat_interleave(3), prompts.repeat(2)

    def within(mine: Tensor, theirs: Tensor) -> float:
        return kid(a[mine], b[theirs], of_a[mine].tolist(), of_b[theirs].tolist())

    found = within_halves(of_a.tolist(), of_b.tolist(), [frozenset({1, 3})], within)
    assert found == [kid(a[[3, 4, 5, 9, 10, 11]], b[[1, 3, 5, 7]], [1, 1, 1, 3, 3, 3], [1, 3, 1, 3])]


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
    with pytest.raises(ValueError, match="at least two prompts of each"):
        kid(normal(4, 2), normal(9, 2), [0] * 4, range(9))
    with pytest.raises(ValueError, match="with N and M"):
        kid(normal(4, 2), normal(9, 2), range(4), range(8))


def test_blocks_of_rows_change_nothing() -> None:
    drawn, real = normal(50, 4) * 0.8, normal(70, 4, 1)
    assert precision_recall(drawn, real, block=8) == precision_recall(drawn, real)


def test_diversity_is_within_a_prompt() -> None:
    features = torch.tensor([[0.0, 0], [3, 4], [100, 0], [100, 0], [7, 7]])
    found = diversity(features, [0, 0, 1, 1, 2])
    assert found[:4].tolist() == [5, 5, 0, 0]
    assert found[4].isnan()


def test_diversity_prompt_by_prompt_is_that_of_all_pairs_at_once() -> None:
    """Also where prompts come in any order and one has more pictures than are looked at together."""
    features, prompts = normal(40, 5), [number % 3 for number in range(40)]
    same = torch.tensor(prompts)[:, None] == torch.tensor(prompts)[None]
    expected = (torch.cdist(features, features) * same).sum(1) / (same.sum(1) - 1)
    for block in (4, 512):
        assert torch.allclose(diversity(features, prompts, block), expected, rtol=1e-6, atol=0)


def test_faithfulness_is_to_the_counterpart() -> None:
    assert paired_distance(torch.tensor([[0.0, 0], [1, 1]]), torch.tensor([[3.0, 4], [1, 1]])).tolist() == [5, 0]
    with pytest.raises(ValueError, match="equal"):
        paired_distance(normal(2, 2), normal(3, 2))

"""Fréchet distance, saturation and retention against values known by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from fewstep.metrics.frechet import frechet_distance
from fewstep.metrics.halves import half_sample_distances, half_samples, with_spread
from fewstep.metrics.retention import corrected_retention, retention
from fewstep.metrics.saturation import channel_std, latent_moments, mean_saturation, saturation


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_formula_with_scipys_square_root() -> None:
    a, b = normal(300, 6) * 2 + 1, normal(500, 6, 1) @ normal(6, 6, 2)
    cov_a, cov_b = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + float(np.trace(cov_a + cov_b - 2 * root))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("pictures", "references", "dimensions"), [(40, 90, 8), (20, 12, 24), (9, 60, 24)])
def test_it_is_torchmetrics_figure(pictures: int, references: int, dimensions: int) -> None:
    """Also with fewer pictures than dimensions, where covariances have no inverse."""

    class Features(nn.Module):
        num_features = dimensions

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    a, b = normal(pictures, dimensions) * 1.5 + 0.3, normal(references, dimensions, 1)
    metric = FrechetInceptionDistance(feature=Features())
    metric.update(b, real=True)
    metric.update(a, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_nothing_between_a_set_and_itself_and_a_shift_counts_squared() -> None:
    a = normal(200, 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a + torch.tensor([3.0, 0, 0, 4.0]), a) == pytest.approx(25, abs=1e-6)


@pytest.mark.parametrize("prompts", [5, 6, 7, 21])
def test_halves_of_few_prompts_odd_ones_too_tell_a_means_standard_error(prompts: int) -> None:
    """Against what is known of a mean: the spread of the n numbers, ddof 1, over √n."""
    numbers = np.random.default_rng(prompts).normal(size=prompts)
    found = with_spread(
        float(numbers.mean()),
        [float(numbers[sorted(half)].mean()) for half in half_samples(range(prompts), halves=20_000)],
        range(prompts),
    )
    assert found.standard_error == pytest.approx(numbers.std(ddof=1) / prompts**0.5, rel=0.03)


def test_half_samples_tell_the_standard_error() -> None:
    """Against the spread of the distance itself over many independent sets."""
    shift, reference = torch.tensor([0.6, 0.0]), normal(4000, 2, 99)
    truth = [frechet_distance(normal(200, 2, seed) + shift, reference) for seed in range(60)]
    numbers = list(range(200))
    picked = reference[:200]
    distances = half_sample_distances(
        normal(200, 2, 7) + shift, numbers, picked, numbers, half_samples(numbers), frechet_distance
    )
    found = with_spread(0.36, distances, numbers)
    assert found.standard_error is not None
    # The reference of 200 varies as well, where that of 4,000 hardly does: up to sqrt(2) more.
    assert 0.7 * np.std(truth) < found.standard_error < 2.2 * np.std(truth)


def test_the_interval_is_students_and_within_what_can_be() -> None:
    """At 95 %, of eight prompts with three pictures each: 2.365 errors, seven degrees of freedom."""
    prompts, spread = [prompt for prompt in range(8) for _ in range(3)], [0.9, 1.0, 1.1, 1.0]
    error = float(np.std(spread, ddof=1))
    free, share = with_spread(1.0, spread, prompts), with_spread(1.0, spread, prompts, least=0.95, most=1.0)
    assert (free.low, free.high) == pytest.approx((1 - 2.3646 * error, 1 + 2.3646 * error), abs=1e-4)
    assert (share.low, share.high, share.standard_error) == (0.95, 1.0, error)


def test_too_few_prompts_for_halves() -> None:
    assert half_samples([0, 0, 1, 1, 2]) == []
    assert with_spread(1.0, [], [0, 1]).low is None


def test_halves_are_of_prompts_and_the_same_each_time() -> None:
    halves = half_samples([0, 0, 1, 1, 2, 2, 3, 3])
    assert halves == half_samples([0, 0, 1, 1, 2, 2, 3, 3]) and {len(half) for half in halves} == {2}


def test_a_half_that_comes_again_is_measured_once() -> None:
    """Four prompts have six halves, and each of a hundred is one of these."""
    prompts, a, b = [0, 0, 1, 1, 2, 2, 3, 3], normal(8, 3, 1), normal(8, 3, 2)
    halves, measured = half_samples(prompts), list[tuple[int, ...]]()

    def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
        measured.append(tuple(theirs.shape))
        return frechet_distance(mine, theirs)

    found = half_sample_distances(a, prompts, b, prompts, halves, distance)
    rows = [[2 * prompt + picture for prompt in sorted(half) for picture in (0, 1)] for half in halves]
    assert found == [frechet_distance(a[some], b[some]) for some in rows] and len(set(found)) == 6
    assert measured == [(4, 3)] * 6


@pytest.mark.parametrize(
    ("a", "b"),
    [(normal(1, 4), normal(9, 4)), (normal(9, 4), normal(9, 3)), (normal(9, 4)[0], normal(9, 4))],
    ids=["one picture", "other features", "no rows"],
)
def test_what_has_no_distance(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="allowed"):
        frechet_distance(a, b)


def test_saturation_is_a_ratio_a_channel() -> None:
    latents = normal(32, 4 * 8 * 8).reshape(32, 4, 8, 8).float()
    burnt = latents * torch.tensor([1.0, 1.1, 0.9, 2.0]).reshape(1, 4, 1, 1) + 5
    found = saturation(latent_moments(burnt), latent_moments(latents))
    assert found == pytest.approx((1.0, 1.1, 0.9, 2.0), rel=1e-5)


def test_channel_std_is_that_of_all_pictures_together() -> None:
    latents = normal(5, 2 * 3 * 3).reshape(5, 2, 3, 3)
    expected = latents.permute(1, 0, 2, 3).reshape(2, -1).std(dim=1, correction=0)
    assert channel_std(latent_moments(latents)).tolist() == pytest.approx(expected.tolist())


def test_constant_latents_have_no_saturation() -> None:
    constant = latent_moments(torch.zeros(2, 4, 2, 2))
    assert saturation(constant, constant) is None and mean_saturation(constant, constant, [0, 1]) is None


def test_the_interval_of_saturation_holds_what_is_true_and_shrinks_with_prompts() -> None:
    """Of 8 pictures a prompt, each prompt with a contrast of its own: what halves differ by is prompts."""
    widths = []
    for prompts in (12, 192):
        latents = normal(8 * prompts, 2 * 4 * 4).reshape(8 * prompts, 2, 4, 4)
        contrast = 0.9 * (1 + 0.2 * normal(prompts, 1)).repeat_interleave(8)[:, None, None, None]
        numbers = [prompt for prompt in range(prompts) for _ in range(8)]
        found = mean_saturation(latent_moments(latents * contrast), latent_moments(latents), numbers)
        assert found is not None and found.low is not None and found.high is not None
        assert found.low < 0.9 * (1 + 0.2**2) ** 0.5 < found.high
        widths.append(found.high - found.low)
    assert 2 < widths[0] / widths[1] < 8  # 16 times the prompts: a quarter of the width


def test_raw_retention_flatters_and_corrected_retention_does_not() -> None:
    """A student at the floor keeps 70 % of the raw score and nothing of what counts."""
    teacher, floor = np.full(20, 30.0), np.full(20, 21.0)
    raw, honest = retention(floor, teacher, range(20)), corrected_retention(floor, floor, teacher, floor, range(20))
    assert raw is not None and raw.value == pytest.approx(0.7)
    assert honest is not None and honest.value == pytest.approx(0)


def test_a_teacher_at_its_floor_has_no_retention() -> None:
    assert corrected_retention([1.0, 2.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.5], [0, 1]) is None
    assert retention([1.0], [0.0], [0]) is None

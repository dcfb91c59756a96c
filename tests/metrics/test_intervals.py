"""Intervals: against closed forms, on clusters, and where there is no honest interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fewstep.metrics.intervals import (
    bootstrap,
    gap_closed,
    paired_difference,
    share,
    share_difference,
    student_t,
    wilson,
)

RANDOM = np.random.default_rng(5)


def test_independent_values_give_the_textbook_standard_error() -> None:
    values = RANDOM.normal(3, 2, 400)
    found = bootstrap(values, range(400))
    expected = values.std(ddof=1) / np.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(expected, rel=0.06)
    assert found.low == pytest.approx(values.mean() - 1.96 * expected, abs=0.03)
    assert found.high == pytest.approx(values.mean() + 1.96 * expected, abs=0.03)


def test_prompts_are_the_clusters() -> None:
    """Ten equal pictures a prompt are worth one: the interval is that of 40 values, not of 400."""
    prompts = RANDOM.normal(0, 1, 40)
    repeated, clusters = np.repeat(prompts, 10), np.repeat(np.arange(40), 10)
    wide, naive = bootstrap(repeated, clusters.tolist()), bootstrap(repeated, range(400))
    assert wide.standard_error == pytest.approx(prompts.std(ddof=1) / np.sqrt(40), rel=0.06)
    assert wide.standard_error is not None and naive.standard_error is not None
    assert wide.standard_error > 2.5 * naive.standard_error


@pytest.mark.parametrize(("prompts", "least"), [(4, 0.84), (5, 0.88), (8, 0.925), (20, 0.93), (60, 0.93)])
def test_95_percent_intervals_cover_95_percent_of_the_time(prompts: int, least: float) -> None:
    """Of the plain percentiles 80, 82, 89, 93 and 94 in 100 would."""
    covered, errors, times = 0, [], 1500
    for seed in range(times):
        values = np.random.default_rng(seed).normal(1, 1, prompts)
        found = bootstrap(values, range(prompts), resamples=500, seed=seed)
        assert found.low is not None and found.high is not None and found.standard_error is not None
        covered += found.low <= 1 <= found.high
        errors.append(found.standard_error**2)
    assert least <= covered / times <= 0.975
    assert np.mean(errors) == pytest.approx(1 / prompts, rel=0.1)


def test_the_same_model_under_other_noise_differs_by_nothing() -> None:
    """Two arms of one model: the interval of the difference covers 0."""
    level = RANDOM.normal(30, 3, 200)
    found = paired_difference(level + RANDOM.normal(0, 1, 200), level + RANDOM.normal(0, 1, 200), range(200))
    assert found.low is not None and found.high is not None and found.low < 0 < found.high
    assert not found.excludes_zero


def test_pairing_takes_out_what_the_arms_share() -> None:
    level = RANDOM.normal(30, 3, 200)
    found = paired_difference(level + 0.3 + RANDOM.normal(0, 0.1, 200), level, range(200))
    assert found.excludes_zero and found.value == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("clusters", [[0, 0, 0], [0, 0, 1], [0, 1, 2]])
def test_a_few_prompts_have_no_interval(clusters: list[int]) -> None:
    found = bootstrap([1.0, 2.0, 3.0], clusters)
    assert (found.value, found.low, found.high, found.standard_error) == (2.0, None, None, None)


def test_a_ratio_whose_denominator_may_vanish_has_no_interval() -> None:
    zeros = np.zeros(8)
    found = gap_closed(zeros, zeros, np.array([0, 0, 0, 0, 0, 0, 0, 1.0]), range(8))
    assert found.low is None


def test_students_t_is_scipys() -> None:
    for freedom in (3, 4, 9, 19, 99, 1999):
        for share_below in (0.025, 0.05, 0.5, 0.9):
            expected = stats.t.ppf(share_below, freedom)
            assert student_t(share_below, freedom) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_gap_that_may_be_the_other_way_round_has_no_interval() -> None:
    untrained = np.tile([1.0, 0.0, 0.0, 1.0], 5)
    teacher = np.tile([0.0, 1.0, 1.0, 0.4123], 5)  # never the untrained arm's mean itself
    found = gap_closed(untrained, 0.5 * untrained, teacher, range(20))
    assert found.value == pytest.approx(0.25 / (0.5 - 0.603075)) and found.low is None and found.high is None


def test_gap_closed() -> None:
    untrained, teacher = RANDOM.normal(1, 0.05, 300), RANDOM.normal(0, 0.05, 300)
    found = gap_closed(untrained, 0.2 * untrained + 0.8 * teacher, teacher, range(300))
    assert found.value == pytest.approx(0.8, abs=0.02)
    assert found.low is not None and found.low > 0.75


def test_one_sided_bounds_come_from_the_90_percent_interval() -> None:
    values = RANDOM.normal(0, 1, 500)
    one, two = bootstrap(values, range(500), level=0.9), bootstrap(values, range(500))
    assert one.low is not None and two.low is not None and one.low > two.low


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson(successes: int, trials: int, low: float, high: float) -> None:
    """Values of Wilson's interval from Newcombe 1998, table I (81 of 263), and from its formula."""
    found = wilson(successes, trials)
    assert found.low == pytest.approx(low, abs=5e-5) and found.high == pytest.approx(high, abs=5e-5)


def test_all_right_is_not_certainty() -> None:
    found = share(np.ones(200, dtype=bool), np.repeat(np.arange(20), 10).tolist())
    assert found.method == "Wilson" and found.high == 1.0
    assert found.low == pytest.approx(wilson(20, 20).low)
    # Likewise where every prompt has the same share of its pictures right.
    half = share([True, False] * 6, [prompt for prompt in range(6) for _ in range(2)])
    assert (half.value, half.low, half.high) == (0.5, wilson(3, 6).low, wilson(3, 6).high)
    third = share([True, False, False] * 5, [prompt for prompt in range(5) for _ in range(3)])
    assert third.value == pytest.approx(1 / 3) and third.low is not None and 0.05 < third.low < 0.2


@pytest.mark.parametrize("right", [[True] * 6, [False] * 6, [True, False] * 3, [True] * 5 + [False]])
def test_a_share_of_a_few_prompts_has_no_interval_either(right: list[bool]) -> None:
    """Else what is all right would have one and what is nearly so none, and the two would be compared by it."""
    found = share(right, [0, 0, 1, 1, 2, 2])
    assert (found.value, found.low, found.high) == (sum(right) / 6, None, None)


def test_a_share_between() -> None:
    found = share([True, False, True, True], range(4))
    assert found.value == 0.75 and found.method == "bootstrap over prompts"


def test_the_same_numbers_give_the_same_interval() -> None:
    values = RANDOM.normal(0, 1, 50)
    assert bootstrap(values, range(50)) == bootstrap(values, range(50))


def test_values_without_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="one cluster a value"):
        bootstrap([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="allowed"):
        wilson(3, 2)


@pytest.mark.parametrize(("mine", "theirs"), [(1, 1), (0, 1), (1, 0)])
def test_outcomes_that_never_differ_leave_a_difference_possible(mine: int, theirs: int) -> None:
    found = share_difference(np.full(40, mine), np.full(40, theirs), [picture // 2 for picture in range(40)])
    unseen = wilson(0, 20).high
    assert unseen is not None and 0.1 < unseen < 0.2
    assert found.value == mine - theirs
    assert found.low == pytest.approx(max(-1, found.value - unseen))
    assert found.high == pytest.approx(min(1, found.value + unseen))


def test_outcomes_that_differ_have_the_bootstraps_interval() -> None:
    mine, theirs = RANDOM.integers(0, 2, 60), RANDOM.integers(0, 2, 60)
    assert share_difference(mine, theirs, range(60)) == paired_difference(mine, theirs, range(60))
    assert share_difference([1, 1], [1, 1], [0, 1]).low is None  # of too few prompts there is none

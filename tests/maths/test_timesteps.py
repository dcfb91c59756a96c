"""The grids against the schedulers that sample, and the rollout's grid against its description."""

from __future__ import annotations

from itertools import pairwise

import pytest
from diffusers import DDIMScheduler, LCMScheduler, TCDScheduler
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import InputError
from fewstep.timesteps import promised_points, rollout_grid, rollout_grids, student_grid, teacher_grid

PROMISED = [999, 879, 759, 639, 499, 379, 259, 139]


@pytest.mark.parametrize("scheduler", [LCMScheduler, TCDScheduler])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_student_grid_is_that_of_the_few_step_schedulers(scheduler: type, spacing: str) -> None:
    sampler = scheduler(timestep_spacing=spacing)
    for steps in range(1, 51):
        sampler.set_timesteps(steps)
        assert student_grid(steps) == sampler.timesteps.tolist(), steps


@pytest.mark.parametrize("count", [50, 100, 777, 1024])
def test_student_grid_of_other_schedules(count: int) -> None:
    sampler = LCMScheduler(num_train_timesteps=count)
    for steps in range(1, 51):
        sampler.set_timesteps(steps)
        assert student_grid(steps, count) == sampler.timesteps.tolist(), steps


def test_a_span_leaves_the_first_timestep_and_spaces_the_rest_evenly_below() -> None:
    assert teacher_grid(4, span=0.6) == [999, 449, 299, 149]
    assert teacher_grid(2, span=0.6) == [999, 299]
    assert teacher_grid(1, span=0.6) == [999]
    for steps in range(1, 51):
        assert teacher_grid(steps, span=1.0) == teacher_grid(steps)
        grid = teacher_grid(steps, span=0.6)
        assert grid[1:] == teacher_grid(steps, 600)[1:] and grid[0] == 999
    assert set(teacher_grid(4, span=0.3)) < set(teacher_grid(8, span=0.3))  # so one path passes them all
    for span in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="timestep_span"):
            teacher_grid(4, span=span)
    with pytest.raises(InputError, match="1 to 100; choose"):
        teacher_grid(101, span=0.1)


def test_student_grids_as_published() -> None:
    assert student_grid(1) == [999]
    assert student_grid(2) == [999, 499]
    assert student_grid(4) == [999, 759, 499, 259]
    assert student_grid(8) == PROMISED


@pytest.mark.parametrize("count", [100, 777, 1000])
def test_teacher_grid_is_trailing_ddim(count: int) -> None:
    sampler = DDIMScheduler(timestep_spacing="trailing", num_train_timesteps=count)
    for steps in range(1, count + 1):
        sampler.set_timesteps(steps)
        # numpy's arange includes its end when rounding lets it: the scheduler then runs one step more, at t = -1.
        theirs = [t for t in sampler.timesteps.tolist() if t >= 0]
        assert teacher_grid(steps, count) == theirs, steps
        assert len(theirs) == steps


def test_promised_points_are_the_union() -> None:
    assert promised_points([1, 2, 4, 8]) == PROMISED
    assert promised_points([4, 4]) == [999, 759, 499, 259]
    assert promised_points([2, 3]) == sorted({*student_grid(2), *student_grid(3)}, reverse=True)


def test_rollout_from_the_top_is_the_students_own_grid() -> None:
    assert rollout_grid(999, 8, PROMISED) == [*student_grid(8), -1]
    assert rollout_grid(999, 4, PROMISED) == [*student_grid(4), -1]  # thinned
    assert rollout_grid(999, 3, PROMISED) == [
        999,
        639,
        379,
        -1,
    ]  # the 3rd and the 5th of 8 knots: 8/3 and 16/3, rounded
    assert rollout_grid(999, 1, PROMISED) == [999, -1]


def test_rollout_from_below_halves_the_widest_gaps() -> None:
    assert rollout_grids(PROMISED, 8) == {
        999: [999, 879, 759, 639, 499, 379, 259, 139, -1],
        879: [879, 759, 639, 569, 499, 379, 259, 139, -1],
        759: [759, 639, 569, 499, 379, 259, 139, 69, -1],
        639: [639, 569, 499, 439, 379, 259, 139, 69, -1],
        499: [499, 439, 379, 319, 259, 199, 139, 69, -1],
        379: [379, 319, 259, 199, 139, 104, 69, 34, -1],
        259: [259, 229, 199, 169, 139, 104, 69, 34, -1],
        139: [139, 122, 104, 87, 69, 52, 34, 17, -1],
    }


@given(
    t=st.integers(0, 999),
    k=st.integers(1, 60),
    points=st.one_of(
        st.lists(st.integers(-1, 999), max_size=20),
        st.lists(st.integers(1, 50), min_size=1, max_size=4).map(promised_points),
    ),
)
def test_rollout_grid_keeps_its_promises(t: int, k: int, points: list[int]) -> None:
    if k > t + 1:
        with pytest.raises(InputError, match="cannot take"):
            rollout_grid(t, k, points)
        return
    grid = rollout_grid(t, k, points)
    assert len(grid) == k + 1
    assert grid[0] == t
    assert grid[-1] == -1
    assert all(high > low for high, low in pairwise(grid))
    knots = sorted({t, -1, *(p for p in points if 0 <= p < t)}, reverse=True)
    if len(knots) > k + 1:
        assert set(grid) < set(knots)
        places = [knots.index(one) for one in grid]  # evenly: steps over the knots differ by one at most
        strides = [low - high for high, low in pairwise(places)]
        assert max(strides) - min(strides) <= 1
    else:
        assert set(knots) <= set(grid)
        widest = max(high - low for high, low in pairwise(grid))
        untouched = set(pairwise(knots))
        for high, low in pairwise(grid):  # nothing was split that was narrower than what was left whole
            assert (high, low) in untouched or 2 * (high - low) + 1 >= widest


@pytest.mark.parametrize("steps", [0, -1, 51])
def test_impossible_student_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match="it runs 1 to 50"):
        student_grid(steps)


def test_other_impossible_grids_are_refused() -> None:
    with pytest.raises(InputError, match="it runs 1 to 20"):
        student_grid(2, num_train_timesteps=20)
    with pytest.raises(InputError, match="it runs 1 to 1000"):
        teacher_grid(1001)
    with pytest.raises(InputError, match="it runs 1 to 1000"):
        teacher_grid(0)
    with pytest.raises(InputError, match="they are 0 to 999"):
        rollout_grid(1000, 8, PROMISED)
    with pytest.raises(InputError, match="--num_ddim_steps"):
        rollout_grid(5, 8, PROMISED)

"""Distillation along the teacher's path: where jumps end, what is aimed at, what a path teaches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.testing import assert_close

from fewstep.errors import InputError
from fewstep.losses import WEIGHTINGS
from fewstep.methods import METHODS
from fewstep.methods.trajectory import Trajectory
from fewstep.randomness import generator
from fewstep.sampling import ddim_sample
from fewstep.schedule import NoiseSchedule
from fewstep.solver import rollout
from fewstep.timesteps import teacher_grid

SHAPE = (4, 6, 6)


def trajectory(schedule: NoiseSchedule, **changes: Any) -> Trajectory:
    settings: dict[str, Any] = {
        "step_counts": (1, 2, 4, 8),
        "num_ddim_steps": 16,
        "guidance": 3.0,
        "pairs_per_rollout": 8,
        "from_noise": True,
    }
    return Trajectory(schedule=schedule, **(settings | changes))


@pytest.fixture
def cond() -> Tensor:
    return torch.randn(5, 2, 6)


@pytest.fixture
def uncond() -> Tensor:
    return torch.randn(1, 2, 6)


def test_it_is_listed() -> None:
    assert METHODS["ddim"] is Trajectory


def test_timesteps_are_those_of_trailing_ddim(schedule: NoiseSchedule) -> None:
    method = trajectory(schedule)
    assert method.points == [999, 874, 749, 624, 499, 374, 249, 124]
    stock = DDIMScheduler(timestep_spacing="trailing")
    for steps in method.step_counts:
        stock.set_timesteps(steps)
        assert set(stock.timesteps.tolist()) <= set(method.points)


def test_a_jump_ends_where_the_count_promised_first_goes_next(schedule: NoiseSchedule) -> None:
    everything = {999: -1, 874: 749, 749: 499, 624: 499, 499: -1, 374: 249, 249: -1, 124: -1}
    assert trajectory(schedule).landings == everything
    for_eight = trajectory(schedule, step_counts=(8, 4, 2, 1)).landings  # the first one named has its way
    assert for_eight == dict(pairwise([*teacher_grid(8), -1]))
    assert trajectory(schedule, step_counts=(1, 4, 2, 8)).landings == everything | {499: 249}
    assert trajectory(schedule, step_counts=(4,)).landings == {999: 749, 749: 499, 499: 249, 249: -1}
    assert trajectory(schedule, step_counts=(2, 4)).landings == {999: 499, 749: 499, 499: -1, 249: -1}


@pytest.mark.parametrize("interval", [None, (300, 700)])
def test_one_step_to_the_target_lands_on_the_teachers_path(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor, interval: tuple[int, int] | None
) -> None:
    method = trajectory(schedule, guidance_interval=interval)
    t = torch.tensor([999, 749, 499, 374, 124])
    x_t = torch.randn(5, *SHAPE)
    target = method.target(toy, x_t, t, cond, uncond)
    for row, (here, landing) in enumerate((one, method.landings[one]) for one in t.tolist()):
        fine = [one for one in method.fine_grid if landing <= one <= here]
        assert fine[0] == here and fine[-1] == landing
        with torch.no_grad():
            there = rollout(
                toy, schedule, x_t[[row]], torch.tensor([fine]), cond[[row]], uncond, 3.0, interval=interval
            )
        eps = schedule.to_eps(schedule.from_x0(target[[row]], x_t[[row]], here), x_t[[row]], here)
        assert_close(schedule.add_noise(target[[row]], eps, landing), there, rtol=1e-3, atol=1e-3)


def test_a_path_teaches_at_every_timestep_what_a_rollout_from_there_would(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor
) -> None:
    method = trajectory(schedule)
    draws = method.draw(7, 3, range(5), SHAPE)
    assert set(draws.t.tolist()) == {999} and draws.pure.all()
    pairs = method.pairs(toy, draws.noise, draws, cond, uncond)
    assert len(pairs.t) == 5 * 8
    for row in range(5):
        assert sorted(pairs.t[pairs.rows == row].tolist(), reverse=True) == method.points
    assert torch.equal(pairs.x_t[:5], draws.noise) and torch.equal(pairs.rows[:5], torch.arange(5))
    again = method.target(toy, pairs.x_t, pairs.t, cond[pairs.rows], uncond)
    assert_close(pairs.target, again, rtol=1e-3, atol=1e-3)
    # At 999 a single step is aimed at, so the end of the path is: the picture of K steps of plain DDIM.
    grids = torch.tensor(method.fine_grid).expand(5, -1)
    with torch.no_grad():
        assert_close(pairs.target[:5], rollout(toy, schedule, draws.noise, grids, cond, uncond, 3.0))
    assert_close(method.own_pictures(toy, draws.noise, cond, uncond), pairs.target[:5])


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_paths_from_different_timesteps_do_not_touch_each_other(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor, solver: str
) -> None:
    method = trajectory(schedule, from_noise=False, pairs_per_rollout=3, solver=solver)
    draws = method.draw(1, 2, range(24), SHAPE)
    assert len(set(draws.t.tolist())) > 3
    many, x_t = torch.randn(24, 2, 6), torch.randn(24, *SHAPE)
    whole = method.pairs(toy, x_t, draws, many, uncond)
    assert torch.equal(whole.x_t[:24], x_t) and torch.equal(whole.t[:24], draws.t)
    for row in range(24):
        alone = method.pairs(toy, x_t[[row]], method.draw(1, 2, [row], SHAPE), many[[row]], uncond)
        mine = whole.rows == row
        assert torch.equal(whole.t[mine], alone.t)
        assert_close(whole.x_t[mine], alone.x_t, rtol=1e-4, atol=1e-4)
        assert_close(whole.target[mine], alone.target, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("from_noise", "most"), [(True, 8), (True, 3), (False, 1), (False, 4)])
def test_every_timestep_counts_alike(schedule: NoiseSchedule, from_noise: bool, most: int) -> None:
    method = trajectory(schedule, from_noise=from_noise, pairs_per_rollout=most)
    share = dict.fromkeys(method.points, 0.0)
    draws = method.draw(3, 0, range(8_000), (1, 1, 1))
    pairs = method.pairs(lambda x_t, t, cond: x_t, draws.noise, draws, torch.zeros(8_000, 1, 1), torch.zeros(1, 1, 1))
    for t, weight in zip(pairs.t.tolist(), pairs.weight.tolist(), strict=True):
        share[t] += weight / 8_000
    assert share == pytest.approx(dict.fromkeys(method.points, 1 / 8), rel=0.2)


def test_the_teacher_is_asked_no_more_than_the_pairs_need(
    schedule: NoiseSchedule, cond: Tensor, uncond: Tensor
) -> None:
    asked: list[int] = []

    def counting(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        asked.append(len(x_t))
        return x_t

    method = trajectory(schedule, step_counts=(4,), num_ddim_steps=16, pairs_per_rollout=4)
    method.target(counting, torch.randn(5, *SHAPE), torch.tensor([999, 999, 749, 749, 749]), cond, uncond)
    assert asked == [4] * 4 + [6] * 4  # two from 999 to 749, then three from there to 499; guidance asks twice
    asked.clear()
    draws = method.draw(0, 0, range(5), SHAPE)
    method.pairs(counting, draws.noise, draws, cond, uncond)
    assert asked == [10] * 16


def test_the_students_own_state_is_where_ddim_takes_it(schedule: NoiseSchedule, toy: Any) -> None:
    method = trajectory(schedule, from_noise=False, pairs_per_rollout=1)
    draws, cond = method.draw(7, 3, range(12), SHAPE), torch.randn(12, 2, 6)
    states = method.own_states(toy, draws, cond, 7, 3, range(12))
    jumps = 0
    for row, (t, steps) in enumerate(zip(draws.t.tolist(), draws.steps.tolist(), strict=True)):
        noise = torch.randn(1, *SHAPE, generator=generator(7, "kstep", "guess", 3, row))
        way = [one for one in teacher_grid(steps) if one >= t]
        jumps += len(way) - 1
        with torch.no_grad():
            arrived = rollout(toy, schedule, noise, torch.tensor([way]), cond[[row]])
        assert_close(states[[row]], arrived, rtol=1e-4, atol=1e-4)
    assert jumps >= 12


def test_the_loss_is_the_error_in_the_x0_that_ddim_steps_with(schedule: NoiseSchedule, toy: Any, cond: Tensor) -> None:
    method = trajectory(schedule, weighting="v")
    t, x_t, target = torch.tensor([999, 749, 499, 249, 124]), torch.randn(5, *SHAPE), torch.randn(5, *SHAPE)
    loss = method.loss(toy, x_t, t, cond, target)
    x0 = schedule.to_x0(toy(x_t, t, cond), x_t, t)
    weight = WEIGHTINGS["v"](schedule.alpha_bar(t))
    assert_close(loss, weight * (x0 - target).square().flatten(1).mean(1))
    loss.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in toy.parameters())


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_a_perfect_student_of_one_count_follows_the_teachers_path_to_its_end(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor, solver: Any
) -> None:
    method = trajectory(schedule, step_counts=(4,), pairs_per_rollout=4, solver=solver)
    noise = torch.randn(5, *SHAPE)

    class Same:
        def draw(self, shape: tuple[int, ...]) -> Tensor:
            return noise

    perfect = method.oracle(toy, uncond)
    with torch.no_grad():
        grids = torch.tensor(method.fine_grid).expand(5, -1)
        path = rollout(toy, schedule, noise, grids, cond, uncond, 3.0, solver=solver)
    for _ in range(2):  # of one batch of pictures nothing is left for the next
        drawn = ddim_sample(perfect, schedule, Same(), SHAPE, teacher_grid(4), cond)  # type: ignore[arg-type]
        assert_close(drawn, path, rtol=1e-2, atol=1e-2)


def test_a_perfect_student_that_learns_from_anywhere_begins_anew_at_each_timestep(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor
) -> None:
    method = trajectory(schedule, step_counts=(4,), pairs_per_rollout=1, from_noise=False, solver="dpmpp")
    perfect, x_t = method.oracle(toy, uncond), torch.randn(5, *SHAPE)
    for t in (torch.full((5,), one) for one in method.points):
        aimed = schedule.to_x0(perfect(x_t, t, cond), x_t, t)
        assert_close(aimed, method.target(toy, x_t, t, cond, uncond), rtol=1e-3, atol=1e-3)


def test_a_path_by_dpmpp_is_the_solvers_and_its_pairs_lie_on_it(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor
) -> None:
    method = trajectory(schedule, step_counts=(4,), num_ddim_steps=8, pairs_per_rollout=4, solver="dpmpp")
    draws, visited = method.draw(0, 0, range(5), SHAPE), list[Tensor]()
    pairs = method.pairs(toy, draws.noise, draws, cond, uncond)
    grids = torch.tensor(method.fine_grid).expand(5, -1)
    with torch.no_grad():
        end = rollout(toy, schedule, draws.noise, grids, cond, uncond, 3.0, visited=visited, solver="dpmpp")
    path = dict(zip(method.fine_grid, [*visited, end], strict=True))
    for t, landing in method.landings.items():
        mine = pairs.t == t
        assert_close(pairs.x_t[mine], path[t], rtol=1e-4, atol=1e-4)
        aim = schedule.jump_x0(path[t], path[landing], t, landing)
        assert_close(pairs.target[mine], aim, rtol=1e-3, atol=1e-3)
    assert_close(method.own_pictures(toy, draws.noise, cond, uncond), end, rtol=1e-4, atol=1e-4)


def test_a_span_moves_the_students_timesteps_and_the_path_passes_them(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor
) -> None:
    method = trajectory(schedule, step_counts=(1, 4, 2, 8), span=0.6)
    assert method.points == [999, 524, 449, 374, 299, 224, 149, 74]
    assert method.landings == {999: -1, 524: 449, 449: 299, 374: 299, 299: 149, 224: 149, 149: -1, 74: -1}
    assert set(method.points) < set(method.fine_grid)
    assert method.arm(4).timesteps == (999, 449, 299, 149)
    draws = method.draw(0, 0, range(5), SHAPE)
    pairs = method.pairs(toy, method.start(torch.zeros(5, *SHAPE), draws), draws, cond, uncond)
    assert sorted(pairs.t.tolist()) == sorted(5 * method.points)
    with torch.no_grad():
        path = rollout(toy, schedule, draws.noise, torch.tensor([[999, *_down(method, 449)]] * 5), cond, uncond, 3)
    at = pairs.t == 449
    assert_close(pairs.x_t[at], path, rtol=1e-4, atol=1e-4)


def _down(method: Trajectory, t: int) -> list[int]:
    """The path's timesteps below the noisiest, as far as t."""
    return [one for one in method.fine_grid[1:] if one >= t]


def test_the_fine_grid_passes_every_timestep(schedule: NoiseSchedule) -> None:
    method = trajectory(schedule, step_counts=(3, 4), num_ddim_steps=12)
    assert set(method.points) < set(method.fine_grid)
    assert method.fine_grid[-1] == -1 and len(method.fine_grid) == 13
    assert all(above > below for above, below in pairwise(method.fine_grid))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_ddim_steps": 7}, "has to pass all 8 timesteps"),
        ({"pairs_per_rollout": 1}, "would never be learnt"),
    ],
)
def test_impossible_settings_are_refused(schedule: NoiseSchedule, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        trajectory(schedule, **changes)


@pytest.mark.parametrize(
    "possible",
    [
        {"step_counts": (25,), "num_ddim_steps": 50},
        {"step_counts": (32,), "num_ddim_steps": 32},
        {"step_counts": (8,), "num_ddim_steps": 50, "span": 0.3},
    ],
)
def test_from_a_low_timestep_it_is_the_rest_of_the_path_that_has_to_exist(
    schedule: NoiseSchedule, possible: dict[str, Any]
) -> None:
    method = trajectory(schedule, **possible)
    assert set(method.points) < set(method.fine_grid) and len(method.fine_grid) == method.num_ddim_steps + 1

"""The teacher's rollout against diffusers' DDIM, against its formula in float64, and against itself one by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, cast

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.testing import assert_close

from fewstep.errors import InputError
from fewstep.schedule import NoiseSchedule
from fewstep.solver import ddim_step, guided_output, rollout
from fewstep.timesteps import promised_points, rollout_grid, teacher_grid
from fewstep.transfer import precise

GUIDANCE = 7.5


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"x_t": torch.randn(4, 4, 6, 6), "cond": torch.randn(4, 3, 6), "uncond": torch.randn(1, 3, 6)}


@pytest.fixture
def mixed_grids() -> Tensor:
    """Four samples at four timesteps, with uneven steps."""
    points = promised_points([1, 2, 4, 8])
    return torch.tensor([rollout_grid(t, 8, points) for t in (999, 499, 139, 259)])


def by_scheduler(scheduler: DDIMScheduler, toy: Any, batch: dict[str, Tensor]) -> Tensor:
    x_t, cond = batch["x_t"], batch["cond"]
    for t in scheduler.timesteps:
        at = t.expand(len(x_t))
        u, c = toy(x_t, at, batch["uncond"].expand_as(cond)), toy(x_t, at, cond)
        x_t = scheduler.step(u + GUIDANCE * (c - u), t, x_t, return_dict=False)[0]
    return x_t


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 50])  # divisors of 1000: DDIMScheduler knows no other strides
def test_rollout_is_ddim_scheduler_on_uniform_strides(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor], sd15: dict[str, Any], steps: int
) -> None:
    scheduler = DDIMScheduler(
        **sd15,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=schedule.prediction_type,
    )
    scheduler.set_timesteps(steps)
    grids = torch.tensor([*teacher_grid(steps), -1]).expand(4, -1)
    with torch.no_grad():
        ours = rollout(toy, schedule, grids=grids, guidance=GUIDANCE, **batch)
        theirs = by_scheduler(scheduler, toy, batch)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_rollout_is_ddim_scheduler_at_zero_terminal_snr(
    toy: Any, batch: dict[str, Tensor], sd15: dict[str, Any]
) -> None:
    config = sd15 | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler(**config, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    grids = torch.tensor([*teacher_grid(10), -1]).expand(4, -1)
    with torch.no_grad():
        ours = rollout(toy, NoiseSchedule.from_config(config), grids=grids, guidance=GUIDANCE, **batch)
        assert_close(ours, by_scheduler(scheduler, toy, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
def test_rollout_by_dpmpp_is_the_scheduler(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor], sd15: dict[str, Any], steps: int
) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **sd15,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        lower_order_final=False,
        euler_at_final=True,  # a last step to x0 has no second order
        prediction_type=schedule.prediction_type,
    )
    scheduler.set_timesteps(steps)
    grids = torch.tensor([*teacher_grid(steps), -1]).expand(4, -1)
    with torch.no_grad():
        ours = rollout(toy, schedule, grids=grids, guidance=GUIDANCE, solver="dpmpp", **batch)
        x_t, cond = batch["x_t"], batch["cond"]
        for t in scheduler.timesteps:
            at = t.expand(len(x_t))
            u, c = toy(x_t, at, batch["uncond"].expand_as(cond)), toy(x_t, at, cond)
            x_t = scheduler.step(u + GUIDANCE * (c - u), t, x_t, return_dict=False)[0]
    assert_close(ours, x_t, rtol=1e-4, atol=3e-4)
    assert steps < 3 or not torch.allclose(ours, rollout(toy, schedule, grids=grids, guidance=GUIDANCE, **batch))


def test_dpmpp_with_different_t_in_one_batch_is_sample_by_sample(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor], mixed_grids: Tensor
) -> None:
    together = rollout(toy, schedule, grids=mixed_grids, guidance=2.0, solver="dpmpp", **batch)
    for row in range(4):
        one = slice(row, row + 1)
        args = (batch["x_t"][one], mixed_grids[one], batch["cond"][one], batch["uncond"])
        alone = rollout(toy, schedule, *args, guidance=2.0, solver="dpmpp")
        assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_dpmpp_at_zero_terminal_snr_begins_with_two_steps_of_ddim(
    toy: Any, batch: dict[str, Tensor], sd15: dict[str, Any]
) -> None:
    schedule = NoiseSchedule.from_config(sd15 | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"})
    grids = torch.tensor([[999, 666, 333]]).expand(4, -1)
    with torch.no_grad():  # from no signal at all there is no line through two x̂0 in log(signal / noise)
        assert_close(*(rollout(toy, schedule, grids=grids, solver=name, **batch) for name in ("dpmpp", "ddim")))


def test_dpmpp_follows_the_path_more_closely(sd15: dict[str, Any], batch: dict[str, Tensor]) -> None:
    schedule = NoiseSchedule.from_config(sd15)

    def normal(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The best denoiser of data that is normal with spread 0.5: its path is known, x keeps its quantile."""
        alpha_bar = schedule.alpha_bar(t).reshape(-1, 1, 1, 1)
        x0 = 0.25 * alpha_bar.sqrt() / (0.25 * alpha_bar + 1 - alpha_bar) * x
        return schedule.from_x0(x0, x, t)

    def error(steps: int, solver: Literal["ddim", "dpmpp"]) -> float:
        grid = [t for t in teacher_grid(steps) if t > 49] + [49]  # short of x0: the last step is DDIM's in both
        start, cond = batch["x_t"], batch["cond"]
        spread = [(0.25 * schedule.alpha_bar(t) + 1 - schedule.alpha_bar(t)).sqrt() for t in (999, 49)]
        arrived = rollout(normal, schedule, start, torch.tensor(grid).expand(4, -1), cond, solver=solver)
        return float((arrived - start * spread[1] / spread[0]).square().mean().sqrt())

    assert error(10, "dpmpp") < error(50, "ddim") < error(10, "ddim")


def test_rollout_is_the_formula_on_any_grid_with_different_t_in_one_batch(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor], mixed_grids: Tensor
) -> None:
    with torch.no_grad():
        ours = rollout(toy, schedule, grids=mixed_grids, guidance=GUIDANCE, **batch)

    # DDIM, eq. 12, sample by sample in float64, from betas on.
    wide = toy.double()
    alpha_bar = [1 - (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    for i in range(1, 1000):
        alpha_bar[i] *= alpha_bar[i - 1]
    alpha_bar.append(1.0)  # alpha_bar[-1]
    uncond = batch["uncond"].double()
    for row, grid in enumerate(mixed_grids.tolist()):
        x, cond = batch["x_t"][row : row + 1].double(), batch["cond"][row : row + 1].double()
        for t, t_next in pairwise(grid):
            at, a, b = torch.tensor([t]), alpha_bar[t], alpha_bar[t_next]
            with torch.no_grad():
                u, c = wide(x, at, uncond), wide(x, at, cond)
            output = u + GUIDANCE * (c - u)
            eps = output if schedule.prediction_type == "epsilon" else a**0.5 * output + (1 - a) ** 0.5 * x
            x = b**0.5 * (x - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - b) ** 0.5 * eps
        assert_close(ours[row : row + 1].double(), x, rtol=1e-4, atol=3e-4)


def test_batched_is_sample_by_sample_gradients_too(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor], mixed_grids: Tensor
) -> None:
    together = rollout(toy, schedule, grids=mixed_grids, guidance=2.0, **batch)
    together.square().mean().backward()
    gradients = [p.grad.clone() for p in toy.parameters()]
    toy.zero_grad()
    for row in range(4):
        one = slice(row, row + 1)
        alone = rollout(
            toy, schedule, batch["x_t"][one], mixed_grids[one], batch["cond"][one], batch["uncond"], guidance=2.0
        )
        assert_close(alone, together[one], rtol=1e-4, atol=1e-5)
        (alone.square().mean() / 4).backward()
    for parameter, gradient in zip(toy.parameters(), gradients, strict=True):
        assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_who_knows_x0_gets_there_on_any_grid(schedule: NoiseSchedule, mixed_grids: Tensor) -> None:
    x0, eps = torch.randn(2, 4, 4, 6, 6)
    x_t = schedule.add_noise(x0, eps, mixed_grids[:, 0])
    cond = torch.zeros(4, 1, 6)
    arrived = rollout(lambda x, t, cond: schedule.from_x0(x0, x, t), schedule, x_t, mixed_grids, cond)
    assert_close(arrived, x0, rtol=1e-4, atol=1e-4)


def test_a_step_to_x0_is_x0_and_a_step_to_itself_is_nothing(schedule: NoiseSchedule) -> None:
    output, x_t = torch.randn(2, 3, 4, 6, 6)
    t = torch.tensor([139, 499, 999])
    assert torch.equal(ddim_step(schedule, output, x_t, t, torch.full((3,), -1)), schedule.to_x0(output, x_t, t))
    assert_close(ddim_step(schedule, output, x_t, t, t), x_t, rtol=1e-5, atol=1e-5)


def test_guidance_is_one_forward_of_2b(toy: Any, batch: dict[str, Tensor]) -> None:
    x_t, cond, t = batch["x_t"], batch["cond"], torch.tensor([3, 400, 999, 0])
    uncond = batch["uncond"].expand_as(cond)
    with torch.no_grad():
        u, c = toy(x_t, t, uncond), toy(x_t, t, cond)
        toy.batches.clear()
        assert_close(guided_output(toy, x_t, t, cond, uncond, 3.0), u + 3 * (c - u), rtol=1e-5, atol=1e-6)
        assert_close(guided_output(toy, x_t, t, cond, batch["uncond"], 3.0), u + 3 * (c - u), rtol=1e-5, atol=1e-6)
        assert toy.batches == [8, 8]
        for guidance in (0.0, 0.5, 1.0):
            assert torch.equal(guided_output(toy, x_t, t, cond, uncond, guidance), c)
        assert toy.batches == [8, 8, 4, 4, 4]
        assert torch.equal(guided_output(toy, x_t, t, cond), c)
    with pytest.raises(InputError, match=r"guidance 3\.0 needs"):
        guided_output(toy, x_t, t, cond, None, 3.0)


def test_samples_that_are_not_guided_cost_half(toy: Any, batch: dict[str, Tensor]) -> None:
    x_t, cond, uncond = batch["x_t"], batch["cond"], batch["uncond"]
    t = torch.tensor([3, 400, 999, 0])
    with torch.no_grad():
        all_guided, plain = guided_output(toy, x_t, t, cond, uncond, 3.0), toy(x_t, t, cond)
        for rows in ([], [2], [0, 3], [0, 1, 2, 3]):
            toy.batches.clear()
            mixed = guided_output(toy, x_t, t, cond, uncond, 3.0, torch.tensor(rows, dtype=torch.int64))
            assert toy.batches == [4 + len(rows)]
            others = [row for row in range(4) if row not in rows]
            assert_close(mixed[rows], all_guided[rows], rtol=1e-5, atol=1e-6)
            assert_close(mixed[others], plain[others], rtol=1e-5, atol=1e-6)


def test_guidance_in_an_interval_is_each_samples_own(
    schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor], mixed_grids: Tensor
) -> None:
    def rolled(interval: tuple[int, int] | None, guidance: float = GUIDANCE) -> Tensor:
        toy.batches.clear()
        return rollout(toy, schedule, grids=mixed_grids, guidance=guidance, interval=interval, **batch)

    low, high = 130, 500
    with torch.no_grad():
        assert torch.equal(rolled((0, 999)), rolled(None)), "everywhere"
        assert torch.equal(rolled((998, 998)), rolled(None, guidance=1.0)), "nowhere"
        ours = rolled((low, high))
        inside = ((mixed_grids[:, :-1] >= low) & (mixed_grids[:, :-1] <= high)).sum().item()
        assert 0 < inside < 4 * 8 and sum(toy.batches) == 4 * 8 + inside
        for row, grid in enumerate(mixed_grids):
            x_t, cond = batch["x_t"][row : row + 1], batch["cond"][row : row + 1]
            for t, t_next in pairwise(grid.unsqueeze(1)):
                weight = GUIDANCE if low <= int(t) <= high else 1.0
                output = guided_output(toy, x_t, t, cond, batch["uncond"], weight)
                x_t = ddim_step(schedule, output, x_t, t, t_next)
            assert_close(ours[row : row + 1], x_t, rtol=1e-4, atol=1e-4)


def test_one_forward_and_one_report_a_step(schedule: NoiseSchedule, toy: Any, batch: dict[str, Tensor]) -> None:
    reports: list[int] = []
    grids = torch.tensor([[999, 400, -1]]).expand(4, -1)
    with torch.no_grad():
        rollout(toy, schedule, grids=grids, guidance=2.0, on_step=lambda: reports.append(1), **batch)
    assert toy.batches == [8, 8]
    assert len(reports) == 2


def test_where_a_device_has_no_fp64_the_cpu_does_it() -> None:
    class OnApple:
        device = torch.device("mps")

        def cpu(self) -> Tensor:
            return torch.tensor([0.5])

    assert torch.equal(precise(cast("Any", OnApple())), torch.tensor([0.5], dtype=torch.float64))

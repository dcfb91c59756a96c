"""The samplers against the schedulers they stand for, with the same noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, TCDScheduler
from torch import Tensor
from torch.testing import assert_close

from fewstep.arms import solver_arm
from fewstep.config.kinds import MOST_STUDENT_STEPS
from fewstep.errors import InputError
from fewstep.randomness import generator
from fewstep.sampling import (
    SAMPLERS,
    PictureNoise,
    ddim_sample,
    dpmpp_karras_sample,
    dpmpp_sample,
    lcm_sample,
    tcd_sample,
)
from fewstep.schedule import NoiseSchedule
from fewstep.timesteps import karras_grid, student_grid, teacher_grid

SHAPE = (4, 6, 6)
PICTURES = [(0, 0), (0, 1), (7, 3)]


@pytest.fixture
def cond() -> Tensor:
    return torch.randn(3, 2, 6)


@pytest.fixture
def uncond() -> Tensor:
    return torch.randn(1, 2, 6)


def test_a_pictures_noise_does_not_depend_on_its_batch() -> None:
    together = PictureNoise(PICTURES, seed=42)
    first, second = together.draw(SHAPE), together.draw(SHAPE)
    assert first.shape == (3, *SHAPE)
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"
    for row, picture in enumerate(PICTURES):
        alone = PictureNoise([picture], seed=42)
        assert torch.equal(alone.draw(SHAPE)[0], first[row])
        assert torch.equal(alone.draw(SHAPE)[0], second[row])
    reversed_batch = PictureNoise(PICTURES[::-1], seed=42)
    assert torch.equal(reversed_batch.draw(SHAPE).flip(0), first)


def test_pictures_prompts_seeds_and_draws_differ() -> None:
    noise = PictureNoise([(0, 0), (0, 1), (1, 0), (10, 0), (1, 1)], seed=42)
    draws = torch.cat([noise.draw(SHAPE), noise.draw(SHAPE), PictureNoise([(0, 0)], seed=43).draw(SHAPE)]).flatten(1)
    likeness = torch.corrcoef(draws) - torch.eye(len(draws))
    assert likeness.abs().max() < 0.4  # 144 numbers each: a standard deviation of 0.08


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_lcm_sample_is_lcm_scheduler(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor, sd15: dict[str, Any], steps: int, guidance: float
) -> None:
    ours = lcm_sample(toy, schedule, PictureNoise(PICTURES, 42), SHAPE, student_grid(steps), cond, uncond, guidance)

    scheduler = LCMScheduler(**sd15, prediction_type=schedule.prediction_type)
    scheduler.set_timesteps(steps)
    generators = [generator(42, "picture", *picture) for picture in PICTURES]
    x_t = torch.stack([torch.randn(SHAPE, generator=one) for one in generators])
    for t in scheduler.timesteps:
        with torch.no_grad():
            c, u = toy(x_t, t.expand(3), cond), toy(x_t, t.expand(3), uncond.expand_as(cond))
        output = c if guidance == 1 else u + guidance * (c - u)
        x_t = scheduler.step(output, t, x_t, generator=generators, return_dict=False)[0]
    assert_close(ours, x_t, rtol=1e-5, atol=1e-4)


def test_lcm_sample_keeps_the_boundary_condition(schedule: NoiseSchedule, toy: Any, cond: Tensor) -> None:
    """Near t = 0 a jump to x0 returns its input: nothing that a scheduler's own grid would show."""
    noise = PictureNoise(PICTURES, 42)
    assert_close(lcm_sample(toy, schedule, noise, SHAPE, [0], cond), PictureNoise(PICTURES, 42).draw(SHAPE))


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_ddim_sample_is_ddim_scheduler(
    schedule: NoiseSchedule, toy: Any, cond: Tensor, uncond: Tensor, sd15: dict[str, Any], steps: int, guidance: float
) -> None:
    noise = PictureNoise(PICTURES, 42)
    ours = ddim_sample(toy, schedule, noise, SHAPE, teacher_grid(steps), cond, uncond, guidance)

    scheduler = DDIMScheduler(
        **sd15, prediction_type=schedule.prediction_type, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    x_t = PictureNoise(PICTURES, 42).draw(SHAPE)
    for t in scheduler.timesteps:
        with torch.no_grad():
            c, u = toy(x_t, t.expand(3), cond), toy(x_t, t.expand(3), uncond.expand_as(cond))
        x_t = scheduler.step(c if guidance == 1 else u + guidance * (c - u), t, x_t, return_dict=False)[0]
    assert_close(ours, x_t, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(schedule: NoiseSchedule, toy: Any, cond: Tensor, name: str) -> None:
    sample, grid = SAMPLERS[name], student_grid(4) if name != "dpmpp-karras" else karras_timesteps(schedule)
    together = sample(toy, schedule, PictureNoise(PICTURES, 42), SHAPE, grid, cond)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    for row, picture in enumerate(PICTURES):
        alone = sample(toy, schedule, PictureNoise([picture], 42), SHAPE, grid, cond[row : row + 1])
        assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


def karras_timesteps(schedule: NoiseSchedule) -> tuple[int, ...]:
    return solver_arm(4, 1.0, schedule.alphas_cumprod.tolist(), karras=True).timesteps


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_samplers_start_from_the_same_noise(schedule: NoiseSchedule, cond: Tensor, name: str) -> None:
    grid = [999, 499] if name != "dpmpp-karras" else karras_timesteps(schedule)
    seen: list[Tensor] = []

    def denoiser(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    steps: list[int] = []
    noise = PictureNoise(PICTURES, 42)
    SAMPLERS[name](denoiser, schedule, noise, SHAPE, grid, cond, on_step=lambda: steps.append(1))
    assert torch.equal(seen[0], PictureNoise(PICTURES, 42).draw(SHAPE))
    assert len(seen) == len(steps) == len(grid)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tcd_sample_is_tcd_scheduler(
    schedule: NoiseSchedule,
    toy: Any,
    cond: Tensor,
    uncond: Tensor,
    sd15: dict[str, Any],
    steps: int,
    eta: float,
    guidance: float,
) -> None:
    ours = tcd_sample(
        toy, schedule, PictureNoise(PICTURES, 42), SHAPE, student_grid(steps), cond, uncond, guidance, eta=eta
    )
    scheduler = TCDScheduler(**sd15, prediction_type=schedule.prediction_type)
    scheduler.set_timesteps(steps)
    generators = [generator(42, "picture", *picture) for picture in PICTURES]
    x_t = torch.stack([torch.randn(SHAPE, generator=one) for one in generators])
    for t in scheduler.timesteps:
        with torch.no_grad():
            c, u = toy(x_t, t.expand(3), cond), toy(x_t, t.expand(3), uncond.expand_as(cond))
        output = c if guidance == 1 else u + guidance * (c - u)
        x_t = scheduler.step(output, t, x_t, eta=eta, generator=generators, return_dict=False)[0]
    assert_close(ours, x_t, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 3, 8, 12, 20, 50])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_sample_is_dpm_solver_multistep_scheduler(
    schedule: NoiseSchedule,
    toy: Any,
    cond: Tensor,
    uncond: Tensor,
    sd15: dict[str, Any],
    steps: int,
    guidance: float,
    karras: bool,
) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **sd15,
        prediction_type=schedule.prediction_type,
        timestep_spacing="trailing",
        use_karras_sigmas=karras,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    grid = karras_grid(steps, schedule.alphas_cumprod.tolist())[0] if karras else teacher_grid(steps)
    assert grid == scheduler.timesteps.tolist()
    sample = dpmpp_karras_sample if karras else dpmpp_sample
    ours = sample(toy, schedule, PictureNoise(PICTURES, 42), SHAPE, grid, cond, uncond, guidance)

    x_t = PictureNoise(PICTURES, 42).draw(SHAPE)
    for t in scheduler.timesteps:
        with torch.no_grad():
            c, u = toy(x_t, t.expand(3), cond), toy(x_t, t.expand(3), uncond.expand_as(cond))
        output = c if guidance == 1 else u + guidance * (c - u)
        x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
    assert_close(ours, x_t, rtol=1e-4, atol=1e-3)


def test_karras_levels_make_an_arm_of_as_many_steps_as_are_allowed(schedule: NoiseSchedule) -> None:
    """At the clean end several levels lie about one timestep."""
    alpha_bar = schedule.alphas_cumprod.tolist()
    for steps in range(2, MOST_STUDENT_STEPS + 1):
        assert len(solver_arm(steps, 7.5, alpha_bar, karras=True).timesteps) == steps
    with pytest.raises(InputError, match="descending"):
        replace(solver_arm(2, 7.5, alpha_bar, karras=False), timesteps=(499, 499))
    with pytest.raises(InputError, match="descending"):
        replace(solver_arm(2, 7.5, alpha_bar, karras=True), timesteps=(498, 499))


def test_dpmpp_needs_fewer_steps_than_ddim(toy: Any, cond: Tensor) -> None:
    """Second order: at twice the steps the error falls to about a quarter, DDIM's to a half."""
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})

    def run(sample: Any, steps: int) -> Tensor:
        return sample(toy, schedule, PictureNoise(PICTURES, 42), SHAPE, teacher_grid(steps), cond)  # type: ignore[no-any-return]

    exact = run(ddim_sample, 1000)
    ddim, dpmpp = ((run(sample, 20) - exact).square().mean().sqrt() for sample in (ddim_sample, dpmpp_sample))
    assert dpmpp < 0.6 * ddim

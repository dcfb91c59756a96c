"""The schedule against diffusers' schedulers, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch.testing import assert_close

from fewstep.errors import InputError
from fewstep.schedule import NoiseSchedule

CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.2, "num_train_timesteps": 100},
    "trained": {"trained_betas": [0.1, 0.2, 0.4, 0.6], "num_train_timesteps": 4},
    "trained_array": {"trained_betas": np.linspace(0.001, 0.02, 1000)},
}
ZERO_SNR = CONFIGS["sd15"] | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def latents(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, 5, 6), torch.randn(batch, 4, 5, 6)


@pytest.mark.parametrize("name", CONFIGS)
def test_alpha_bar_is_that_of_diffusers(name: str) -> None:
    ours = NoiseSchedule.from_config(CONFIGS[name])
    theirs = DDIMScheduler(**CONFIGS[name])
    assert ours.alphas_cumprod.dtype == torch.float32
    assert ours.num_train_timesteps == theirs.config.num_train_timesteps
    assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-6, atol=1e-9)


def test_sd15_numbers() -> None:
    schedule = NoiseSchedule.from_config(CONFIGS["sd15"])
    assert schedule.prediction_type == "epsilon"
    assert schedule.alpha_bar(0).item() == pytest.approx(0.99915, abs=1e-6)
    assert schedule.alpha_bar(999).item() == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.parametrize("name", ["sd15", "linear", "cosine"])
def test_zero_terminal_snr_is_that_of_diffusers_and_ends_at_zero(name: str) -> None:
    config = CONFIGS[name] | {"rescale_betas_zero_snr": True}
    ours = NoiseSchedule.from_config(config, "v_prediction")
    # The scheduler goes back to betas and multiplies them up again: a thousand roundings.
    assert_close(ours.alphas_cumprod, DDIMScheduler(**config).alphas_cumprod, rtol=2e-4, atol=1e-8)
    assert ours.alpha_bar(999).item() == 0
    assert_close(ours.alpha_bar(0), NoiseSchedule.from_config(CONFIGS[name]).alpha_bar(0))


def test_alpha_bar_takes_any_shape_and_minus_one() -> None:
    schedule = NoiseSchedule.from_config(CONFIGS["sd15"])
    t = torch.tensor([[-1, 0], [500, 999]])
    alpha_bar = schedule.alpha_bar(t)
    assert alpha_bar.shape == t.shape
    assert alpha_bar.dtype == torch.float32
    assert alpha_bar[0, 0] == 1
    assert torch.equal(alpha_bar.flatten()[1:], schedule.alphas_cumprod[[0, 500, 999]])
    assert schedule.alpha_bar(-1).item() == 1


def test_add_noise_is_that_of_diffusers() -> None:
    x0, noise = latents()
    t = torch.tensor([0, 499, 999])
    schedule = NoiseSchedule.from_config(CONFIGS["sd15"])
    assert_close(schedule.add_noise(x0, noise, t), DDIMScheduler(**CONFIGS["sd15"]).add_noise(x0, noise, t))
    assert torch.equal(schedule.add_noise(x0, noise, -1), x0)
    assert torch.equal(schedule.add_noise(x0, noise, 499)[1], schedule.add_noise(x0, noise, t)[1])


def test_every_conversion_finds_what_the_noised_latent_was_made_of(schedule: NoiseSchedule) -> None:
    x0, eps = latents()
    t = torch.tensor([19, 499, 999])
    x_t = schedule.add_noise(x0, eps, t)
    v = DDIMScheduler(**CONFIGS["sd15"]).get_velocity(x0, eps, t)
    output = v if schedule.prediction_type == "v_prediction" else eps
    assert_close(schedule.to_x0(output, x_t, t), x0, rtol=1e-4, atol=1e-5)
    assert_close(schedule.to_eps(output, x_t, t), eps, rtol=1e-4, atol=1e-5)
    assert_close(schedule.to_v(output, x_t, t), v, rtol=1e-4, atol=1e-5)
    # At t = 19 an error of 1 in x0 is one of 8 in eps.
    assert_close(schedule.from_x0(x0, x_t, t), output, rtol=1e-4, atol=1e-5)


def test_from_x0_undoes_to_x0(schedule: NoiseSchedule) -> None:
    x0, x_t = latents()
    t = torch.tensor([0, 259, 999])
    assert_close(schedule.to_x0(schedule.from_x0(x0, x_t, t), x_t, t), x0, rtol=1e-4, atol=1e-5)


def test_v_prediction_works_at_zero_terminal_snr() -> None:
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    x0, eps = latents()
    x_t = schedule.add_noise(x0, eps, 999)
    assert torch.equal(x_t, eps)
    assert_close(schedule.from_x0(x0, x_t, 999), -x0)
    assert_close(schedule.to_x0(-x0, x_t, 999), x0)
    assert_close(schedule.to_eps(-x0, x_t, 999), eps)


def test_boundary_scalings_are_those_of_lcm() -> None:
    schedule, scheduler = NoiseSchedule.from_config(CONFIGS["sd15"]), LCMScheduler()
    t = torch.arange(1000)
    c_skip, c_out = schedule.boundary_scalings(t)
    their_skip, their_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
    assert torch.equal(c_skip, their_skip)
    assert torch.equal(c_out, their_out)
    assert c_skip[0] == 1
    assert c_out[0] == 0
    assert c_skip[139:].max() < 1.3e-7
    assert c_skip[19].item() == pytest.approx(7e-6, rel=0.02)


@pytest.mark.parametrize("t", [0, 1, 19, 139, 499, 999])
def test_consistency_is_lcms_denoised(schedule: NoiseSchedule, t: int) -> None:
    output, x_t = latents()
    scheduler = LCMScheduler(**CONFIGS["sd15"], prediction_type=schedule.prediction_type)
    scheduler.set_timesteps(50)
    scheduler._step_index = 0  # its step() looks the timestep up in the grid; here any timestep is wanted
    denoised = scheduler.step(output, torch.tensor(t), x_t, return_dict=False)[1]
    assert_close(schedule.consistency(output, x_t, torch.full((3,), t)), denoised, rtol=1e-6, atol=1e-6)
    assert_close(schedule.consistency(output, x_t, t), denoised, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("t", [999, torch.tensor([139, 499, 999])])
def test_half_precision_latents_are_promoted(schedule: NoiseSchedule, t: Any) -> None:
    output, x_t = (x.half() for x in latents())
    for result in (
        schedule.add_noise(output, x_t, t),
        schedule.to_x0(output, x_t, t),
        schedule.consistency(output, x_t, t),
    ):
        assert result.dtype == torch.float32


def test_latents_are_never_clamped() -> None:
    schedule = NoiseSchedule.from_config(CONFIGS["sd15"] | {"clip_sample": True, "thresholding": True})
    x_t = torch.full((1, 4, 2, 2), 7.0)
    assert schedule.to_x0(torch.zeros_like(x_t), x_t, 0).min() > 7


def test_the_given_prediction_type_overrules_the_configs() -> None:
    assert NoiseSchedule.from_config(CONFIGS["sd15"] | {"prediction_type": None}).prediction_type == "epsilon"
    assert NoiseSchedule.from_config(ZERO_SNR).prediction_type == "v_prediction"
    config = CONFIGS["sd15"] | {"prediction_type": "sample"}
    assert NoiseSchedule.from_config(config, "v_prediction").prediction_type == "v_prediction"


def test_moving_keeps_everything() -> None:
    schedule = NoiseSchedule.from_config(ZERO_SNR)
    moved = schedule.to("cpu")
    assert moved.prediction_type == "v_prediction"
    assert torch.equal(moved.alphas_cumprod, schedule.alphas_cumprod)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not supported"),
        ({"prediction_type": "flow_prediction"}, "epsilon or v_prediction"),
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"trained_betas": [0.1, 0.2]}, r"shape \[2\].*\[1000\]"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "zero terminal SNR"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, r"outside \[0, 1\]"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, r"outside \[0, 1\]"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported"),
        ({"beta_schedule": None}, "linear, scaled_linear or squaredcos_cap_v2"),
        ({"beta_start": ...}, "no beta_start"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (CONFIGS["sd15"] | change).items() if value is not ...}
    with pytest.raises(InputError, match=message) as refusal:
        NoiseSchedule.from_config(config)
    assert "\n" not in str(refusal.value)

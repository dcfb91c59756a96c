"""The scheduler that lies beside an adapter: a stock pipeline draws with it what our samplers draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewstep.arms import sampler_timesteps
from fewstep.lora.sampler import save_scheduler
from fewstep.sampling import PictureNoise, ddim_sample, lcm_sample
from fewstep.schedule import NoiseSchedule

SHAPE = (4, 4, 4)
PICTURES = [(0, 0), (3, 1)]
COND = torch.zeros(2, 1, 1)
SD15 = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
ODD = {"clip_sample": True, "thresholding": True, "steps_offset": 1, "set_alpha_to_one": False}
V = {"prediction_type": "v_prediction"}
LEVELS = {
    "_class_name": "DPMSolverMultistepScheduler",
    "use_karras_sigmas": True,
    "solver_order": 2,
    "timestep_spacing": "leading",
}


def network(x_t: Tensor, t: Tensor, _cond: Tensor) -> Tensor:
    """Strong enough for x0 beyond 1, which clipping would cut."""
    return 0.8 * x_t + torch.sin(3 * x_t) * (1 + t.view(-1, 1, 1, 1) / 1000)


def drawn_by(scheduler: Any, **steps: Any) -> Tensor:
    """What a pipeline without guidance does with it."""
    scheduler.set_timesteps(**steps)
    x_t = PictureNoise(PICTURES, 5).draw(SHAPE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x_t, t), torch.full((2,), int(t)), COND)
        x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
    return x_t


def saved(folder: Path, *arguments: Any) -> Any:
    save_scheduler(folder, *arguments)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_pretrained(folder / "scheduler", local_files_only=True)


@pytest.mark.parametrize(
    "base",
    [SD15, SD15 | ODD, SD15 | LEVELS, SD15 | V, SD15 | V | {"rescale_betas_zero_snr": True}],
    ids=["sd15", "odd", "karras", "v", "zero snr"],
)
@pytest.mark.parametrize("steps", [1, 3, 4, 6, 7, 15])
@pytest.mark.parametrize("span", [1.0, 0.85])
def test_ddim_whatever_the_number_of_steps(base: dict[str, Any], steps: int, span: float, tmp_path: Path) -> None:
    timesteps = sampler_timesteps("ddim", steps, 1000, span)
    schedule = NoiseSchedule.from_config(base)
    ours = ddim_sample(network, schedule, PictureNoise(PICTURES, 5), SHAPE, timesteps, COND)
    scheduler = saved(tmp_path, base, "ddim", span, (steps,))
    asked = {"num_inference_steps": steps} if span == 1 else {"timesteps": list(timesteps)}
    # Where ᾱ is 0 at the end, diffusers' DPM-Solver++ takes 2⁻²⁴ instead: a signal of 1/4096.
    near = 2e-2 if base.get("rescale_betas_zero_snr") and not isinstance(scheduler, diffusers.DDIMScheduler) else 1e-4
    assert_close(drawn_by(scheduler, **asked), ours, rtol=near, atol=near)
    assert scheduler.timesteps.tolist() == list(timesteps)


@pytest.mark.parametrize("steps", [(4,), (1, 2, 4, 8)])
def test_ddims_own_scheduler_where_it_lands_right(steps: tuple[int, ...], tmp_path: Path) -> None:
    assert isinstance(saved(tmp_path, SD15, "ddim", 1.0, steps), diffusers.DDIMScheduler)


@pytest.mark.parametrize("base", [SD15, SD15 | ODD], ids=["sd15", "odd"])
def test_lcm_clips_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    ours = lcm_sample(network, NoiseSchedule.from_config(base), PictureNoise(PICTURES, 5), SHAPE, [999], COND)
    assert ours.abs().max() > 1.5
    assert_close(drawn_by(saved(tmp_path, base, "lcm"), num_inference_steps=1), ours, rtol=1e-4, atol=1e-4)


def test_lcms_own_numbers_are_those_that_were_trained_with(tmp_path: Path) -> None:
    """Whatever a base's own scheduler says of them."""
    base = SD15 | {"_class_name": "LCMScheduler", "original_inference_steps": 100, "timestep_scaling": 1.0}
    scheduler = saved(tmp_path, base, "lcm")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == list(sampler_timesteps("lcm", 4, 1000, 1.0)) == [999, 759, 499, 259]
    assert scheduler.config.timestep_scaling == 10

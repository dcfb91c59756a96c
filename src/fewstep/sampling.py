"""From noise to latents: the student's few-step sampler, the teacher's, and noise that belongs to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fewstep.randomness import generator
from fewstep.schedule import NoiseSchedule
from fewstep.solver import Denoiser, OnStep, ddim_step, guided_output, rollout
from fewstep.timesteps import karras_grid


class PictureNoise:
    """Noise for a batch of pictures, a generator each, so that a picture does not depend on its batch.

    The first draw is the noise that sampling starts from: the same for a picture whatever samples it. Further draws are
    what the few-step sampler adds back between its steps.
    """

    def __init__(self, pictures: Sequence[tuple[int, int]], seed: int) -> None:
        """
        Args:
            pictures: (prompt number, picture number) of each of the B pictures.
            seed: of the whole run.
        """
        self._generators = [generator(seed, "picture", prompt, picture) for prompt, picture in pictures]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal noise, [B, *shape] fp32 on the CPU."""
        return torch.stack([torch.randn(*shape, generator=one) for one in self._generators])


@torch.no_grad()
def lcm_sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: PictureNoise,
    shape: Sequence[int],
    timesteps: Sequence[int],
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Multistep consistency sampling as `LCMScheduler` does it (Song et al. 2023, algorithm 1).

    At every timestep: jump to x0, then add fresh noise up to the next timestep. After the last jump nothing is added.

    Args:
        noise: draws once a timestep.
        shape: of one latent, (C, H, W).
        timesteps: noisiest first; `timesteps.student_grid` is what schedulers use.
        cond, uncond, guidance: see `solver.guided_output`; a distilled student needs no guidance.
        on_step: called after every timestep.

    Returns:
        x0, [B, C, H, W] fp32 on the device of `cond`.
    """
    x_t = noise.draw(shape).to(cond.device)
    x0 = x_t
    for step, t in enumerate(timesteps):
        if step > 0:
            x_t = schedule.add_noise(x0, noise.draw(shape).to(cond.device), t)
        at = torch.full((len(x_t),), t, device=cond.device)
        x0 = schedule.consistency(guided_output(denoiser, x_t, at, cond, uncond, guidance), x_t, at)
        if on_step is not None:
            on_step()
    return x0


@torch.no_grad()
def ddim_sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: PictureNoise,
    shape: Sequence[int],
    timesteps: Sequence[int],
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Deterministic DDIM from pure noise through `timesteps` to x0 itself (`set_alpha_to_one=True`).

    Arguments and result are `lcm_sample`'s; `timesteps.teacher_grid` is the usual grid. Draws noise once.
    """
    x_t = noise.draw(shape).to(cond.device)
    grids = torch.tensor([*timesteps, -1], device=cond.device).expand(len(x_t), -1)
    return rollout(denoiser, schedule, x_t, grids, cond, uncond, guidance, on_step)


@torch.no_grad()
def tcd_sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: PictureNoise,
    shape: Sequence[int],
    timesteps: Sequence[int],
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    on_step: OnStep | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """Strategic stochastic sampling as `TCDScheduler` does it (Zheng et al. 2024, algorithm 4; their γ is `eta`).

    From t a deterministic step to s = ⌊(1 − eta) t_next⌋, then noise back up to t_next:

        x_s = √ᾱ_s x̂0 + √(1−ᾱ_s) ε̂,   x_next = √(ᾱ_next / ᾱ_s) x_s + √(1 − ᾱ_next / ᾱ_s) z

    At eta 0 it is DDIM on the few-step grid, at 1 nearly `lcm_sample`. The last step ends at timestep 0 and adds
    nothing. Arguments and result are otherwise `lcm_sample`'s.
    """
    x_t = noise.draw(shape).to(cond.device)
    for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
        at = torch.full((len(x_t),), t, device=cond.device)
        output = guided_output(denoiser, x_t, at, cond, uncond, guidance)
        below = int((1 - eta) * t_next)
        x_t = ddim_step(schedule, output, x_t, at, torch.full_like(at, below))
        if eta > 0 and t != timesteps[-1]:
            kept = schedule.alpha_bar(t_next) / schedule.alpha_bar(below)
            x_t = kept.sqrt() * x_t + (1 - kept).sqrt() * noise.draw(shape).to(cond.device)
        if on_step is not None:
            on_step()
    return x_t


@torch.no_grad()
def dpmpp_sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: PictureNoise,
    shape: Sequence[int],
    timesteps: Sequence[int],
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), the multistep solver that needs the fewest steps without any training; see `dpmpp_step`.

    Arguments and result are `lcm_sample`'s. Draws noise once.
    """
    x_t = noise.draw(shape).to(cond.device)
    grids = torch.tensor([*timesteps, -1], device=cond.device).expand(len(x_t), -1)
    return rollout(denoiser, schedule, x_t, grids, cond, uncond, guidance, on_step, solver="dpmpp")


@torch.no_grad()
def dpmpp_karras_sample(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    noise: PictureNoise,
    shape: Sequence[int],
    timesteps: Sequence[int],
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """`dpmpp_sample` on the noise levels of `timesteps.karras_grid`, whose timesteps `timesteps` are.

    The levels lie between the timesteps: they make a schedule of their own, and the network is asked at the timestep
    next to each.
    """
    _, sigmas = karras_grid(len(timesteps), schedule.alphas_cumprod.tolist())
    rising = torch.tensor(sigmas[::-1], dtype=torch.float64)
    levels = replace(schedule, alphas_cumprod=(1 / (1 + rising.square())).float().to(cond.device))
    asked = torch.tensor(list(timesteps)[::-1], device=cond.device)

    def at_level(x_t: Tensor, level: Tensor, prompts: Tensor, /) -> Tensor:
        return denoiser(x_t, asked[level], prompts)

    every = range(len(sigmas) - 1, -1, -1)
    return dpmpp_sample(at_level, levels, noise, shape, every, cond, uncond, guidance, on_step)


class Sample(Protocol):
    """What every sampler here is; see `lcm_sample` for the arguments."""

    def __call__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        noise: PictureNoise,
        shape: Sequence[int],
        timesteps: Sequence[int],
        cond: Tensor,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        on_step: OnStep | None = None,
    ) -> Tensor: ...


SAMPLERS: dict[str, Sample] = {
    "ddim": ddim_sample,
    "lcm": lcm_sample,
    "tcd": tcd_sample,
    "dpmpp": dpmpp_sample,
    "dpmpp-karras": dpmpp_karras_sample,
}
"""The samplers by the names that arms give them."""

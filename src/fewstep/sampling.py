"""From noise to latents: the student's few-step sampler, the teacher's, and noise that belongs to a picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.randomness import generator
from fewstep.schedule import NoiseSchedule
from fewstep.solver import Denoiser, OnStep, ddim_rollout, guided_output


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
    return ddim_rollout(denoiser, schedule, x_t, grids, cond, uncond, guidance, on_step)

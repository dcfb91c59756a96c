"""The teacher: classifier-free guidance and its ODE solvers, for a batch whose samples stand at different timesteps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.schedule import NoiseSchedule
from fewstep.transfer import precise, upload

TeacherSolver = Literal["ddim", "dpmpp"]
"""How the teacher gets from one timestep to the next: by DDIM, or by DPM-Solver++(2M), which from the second step on
is closer to where very many steps would arrive, at the same cost."""

OnStep = Callable[[], object]
"""Called without arguments after every solver step: a progress bar's `advance` will do."""


class Denoiser(Protocol):
    """A network with everything about it settled: adapter, precision, device."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor, /) -> Tensor:
        """The raw output [B, C, H, W] fp32 for latents [B, C, H, W], timesteps int64 [B] and prompts [B, L, D]."""
        ...


def guided_output(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    guided: Tensor | None = None,
) -> Tensor:
    """u + w (c − u) in one forward of 2B (classifier-free guidance, Ho & Salimans 2022; their weight is w − 1).

    Of the G samples that are guided; of the rest it is c, and the forward is one of B + G. At w ≤ 1 it is c alone, in
    one of B: 0 and 1 are the same, as in diffusers' pipelines.

    Args:
        x_t: [B, C, H, W].
        t: int64 [B].
        cond: the prompts' embeddings [B, L, D].
        uncond: the empty or negative prompt's embedding [B, L, D] or [1, L, D].
        guidance: w.
        guided: int64 [G], which samples; None for all.

    Returns:
        The raw network output [B, C, H, W].

    Raises:
        InputError: guidance above 1 without `uncond`.
    """
    if guidance <= 1 or (guided is not None and not len(guided)):
        return denoiser(x_t, t, cond)
    if uncond is None:
        raise InputError(
            f"guidance {guidance} needs the embedding of an empty or negative prompt; pass uncond, or guidance 1"
        )
    rows = torch.arange(len(x_t), device=x_t.device) if guided is None else guided
    both = denoiser(
        torch.cat([x_t[rows], x_t]), torch.cat([t[rows], t]), torch.cat([uncond.expand_as(cond)[rows], cond])
    )
    u, c = both[: len(rows)], both[len(rows) :]
    return c.index_copy(0, rows, u + guidance * (c[rows] - u))


def ddim_step(schedule: NoiseSchedule, output: Tensor, x_t: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """x_{t_next} = √ᾱ_{t_next} x̂0 + √(1−ᾱ_{t_next}) ε̂ (DDIM, Song et al. 2021, eq. 12 with σ = 0), [B, C, H, W].

    Args:
        output: the raw network output [B, C, H, W] at x_t [B, C, H, W].
        t: int64 [B], where each sample is.
        t_next: int64 [B], where it goes; −1 is x0.
    """
    x0, eps = schedule.to_x0(output, x_t, t), schedule.to_eps(output, x_t, t)
    return schedule.add_noise(x0, eps, t_next)


def dpmpp_step(
    schedule: NoiseSchedule,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    x0_before: Tensor,
    t_before: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), and the x̂0 that the next one wants to be told.

    It is a DDIM step with x̂0 led on along the line through the one before, halfway into the step: with
    λ = log(√ᾱ / √(1−ᾱ)), D = x̂0 + (λ_next − λ) / 2 (λ − λ_before) · (x̂0 − x̂0_before). A step to x0 itself is DDIM's.

    Args:
        output, x_t, t, t_next: as in `ddim_step`.
        x0_before: x̂0 [B, C, H, W] of each sample's step before.
        t_before: int64 [B], where it was then; t itself where this is its first step, which is DDIM's.

    Returns:
        x_{t_next} and x̂0, [B, C, H, W] each.
    """
    x0 = schedule.to_x0(output, x_t, t)
    before, here, there = (_log_ratio(schedule, at) for at in (t_before, t, t_next))
    straight = ((t_before == t) | (t_next < 0)).to(here.device)
    share = torch.where(straight, 0.0, 0.5 * (there - here) / torch.where(straight, 1.0, here - before)).float()
    share = share.to(x_t.device)
    led_on = x0 + share.reshape(-1, 1, 1, 1) * (x0 - x0_before)
    return ddim_step(schedule, schedule.from_x0(led_on, x_t, t), x_t, t, t_next), x0


def _log_ratio(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """λ = log(√ᾱ / √(1−ᾱ)), `precise` in the shape of `t`; of x0, where it is infinite, that of t = 0."""
    alpha_bar = precise(schedule.alpha_bar(t.clamp(min=0)))
    return 0.5 * (alpha_bar.log() - (1 - alpha_bar).log())


def solver_step(
    solver: TeacherSolver,
    schedule: NoiseSchedule,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    x0_before: Tensor,
    t_before: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of `solver`, arguments and result as `dpmpp_step`; DDIM only passes x0_before on."""
    if solver == "dpmpp":
        return dpmpp_step(schedule, output, x_t, t, t_next, x0_before, t_before)
    return ddim_step(schedule, output, x_t, t, t_next), x0_before


def rollout(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    x_t: Tensor,
    grids: Tensor,
    cond: Tensor,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    on_step: OnStep | None = None,
    visited: list[Tensor] | None = None,
    interval: tuple[int, int] | None = None,
    solver: TeacherSolver = "ddim",
) -> Tensor:
    """Follow each sample's own grid without chance; one (guided) forward a step for the whole batch.

    Args:
        x_t: [B, C, H, W], sample b noised to `grids[b, 0]`.
        grids: int64 [B, K + 1], falling along each row; where a row ends in −1 the result is x0. With an interval best
            on the CPU: the device need not be waited for then.
        cond, uncond, guidance: see `guided_output`.
        interval: (low, high), the timesteps at which there is guidance (Kynkäänniemi et al. 2024); None for all.
        visited: is filled with the latents at `grids[:, 0]` … `grids[:, K - 1]`, [B, C, H, W] each.

    Returns:
        The latents [B, C, H, W] at `grids[:, -1]`; gradients flow through all steps unless the caller forbids it.
    """
    columns = upload(grids, x_t.device).T
    x0, t_before = x_t, columns[0]
    for place, (t, t_next) in enumerate(pairwise(columns)):
        guided = None
        if interval is not None:
            inside = (interval[0] <= grids[:, place]) & (grids[:, place] <= interval[1])
            guided = upload(inside.nonzero().squeeze(1), x_t.device)
        if visited is not None:
            visited.append(x_t)
        output = guided_output(denoiser, x_t, t, cond, uncond, guidance, guided)
        x_t, x0 = solver_step(solver, schedule, output, x_t, t, t_next, x0, t_before)
        t_before = t
        if on_step is not None:
            on_step()
    return x_t

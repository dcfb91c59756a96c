"""The only grids of timesteps: where the student samples, where the teacher samples, where the teacher rolls out.

A grid is a list of integers, noisiest first. −1 stands for the clean latent x0 and only ever ends a rollout.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import floor, log

from fewstep.errors import InputError

ORIGINAL_STEPS = 50
"""How many timesteps few-step samplers choose from: `original_inference_steps` of LCMScheduler and TCDScheduler."""

KARRAS_RHO = 7.0
"""How much finer Karras levels become towards the clean end; the value of the paper and of diffusers."""


def student_grid(steps: int, num_train_timesteps: int = 1000, original_steps: int = ORIGINAL_STEPS) -> list[int]:
    """The `steps` timesteps at which `LCMScheduler` and `TCDScheduler` run, whatever `timestep_spacing` says.

    They thin the `original_steps` timesteps k−1, 2k−1, … with k = T // original_steps, from the noisiest down
    (LCM, Luo et al. 2023, section 4.3). For T = 1000: 1 step [999], 2 [999, 499], 4 [999, 759, 499, 259].

    Raises:
        InputError: `steps` is not in 1 … `original_steps`, or there are fewer timesteps than that.
    """
    if not 1 <= steps <= original_steps <= num_train_timesteps:
        raise InputError(
            f"a few-step sampler cannot run {steps} steps; it runs 1 to {min(original_steps, num_train_timesteps)}; "
            "choose fewer steps, or sample without an adapter"
        )
    stride = num_train_timesteps // original_steps
    # In floating point as the schedulers compute it: where i · 50 / steps is whole, rounding may put it one lower.
    chosen = [floor(i * (original_steps / steps)) for i in range(steps)]
    return [(original_steps - index) * stride - 1 for index in chosen]


def teacher_grid(steps: int, num_train_timesteps: int = 1000, span: float = 1.0) -> list[int]:
    """The `steps` timesteps of DDIM with "trailing" spacing (Lin et al. 2024, table 2): from T−1, evenly down to x0.

    The end, −1, is left to the solver. For T = 1000: 4 steps [999, 749, 499, 249]. Equal to `DDIMScheduler`'s, except
    that for some numbers (61 of 1000) rounding makes the scheduler append a step at t = −1.

    Args:
        span: below 1 all timesteps but the first are those of "trailing" spacing over the lower `span` · T alone: with
            0.6 and 4 steps [999, 449, 299, 149]. The more steps lie there, the smaller those where details are decided.

    Raises:
        InputError: `steps` is not in 1 … `span` · T, or `span` not above 0 and at most 1.
    """
    if not 0 < span <= 1:
        raise InputError(f"timestep_span {span} came; it is the share of the schedule to step through; choose one to 1")
    reach = num_train_timesteps * span
    if not 1 <= steps <= reach:
        within = f" within the lower {span:g} of the schedule" if span < 1 else ""
        raise InputError(f"DDIM cannot run {steps} steps{within}; it runs 1 to {int(reach)}; choose one of these")
    # In floating point as numpy's arange computes it for diffusers, whose halves then round the same way.
    stride = reach - (reach - reach / steps)
    return [num_train_timesteps - 1, *(round(reach - i * stride) - 1 for i in range(1, steps))]


def karras_grid(steps: int, alphas_cumprod: Sequence[float], rho: float = KARRAS_RHO) -> tuple[list[int], list[float]]:
    """The `steps` noise levels of Karras et al. (2022, eq. 5) between the schedule's own ends, noisiest first.

    σ_i = (σ_max^{1/ρ} + i / (n − 1) · (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ with σ² = (1 − ᾱ) / ᾱ; the end, σ = 0, is left to
    the solver. Between two timesteps the network is asked at the nearer one by log σ, as diffusers' schedulers do.

    Args:
        alphas_cumprod: ᾱ of every timestep, falling.

    Returns:
        The timesteps at which the network is asked, and σ of every step.

    Raises:
        InputError: fewer than 2 steps or more than there are timesteps, or ᾱ = 0 at the noisiest one.
    """
    if not 2 <= steps <= len(alphas_cumprod):
        raise InputError(f"Karras levels for {steps} steps came; allowed are 2 to {len(alphas_cumprod)}; choose these")
    if alphas_cumprod[-1] <= 0:
        raise InputError(
            "Karras noise levels came for a schedule that ends at pure noise, where they are infinite; allowed are "
            "trailing timesteps; pass --no_solver_karras"
        )
    known = [((1 - alpha_bar) / alpha_bar) ** 0.5 for alpha_bar in alphas_cumprod]
    first, last = known[-1] ** (1 / rho), known[0] ** (1 / rho)
    sigmas = [(first + i / (steps - 1) * (last - first)) ** rho for i in range(steps)]
    return [_nearest_level(sigma, known) for sigma in sigmas], sigmas


def _nearest_level(sigma: float, known: Sequence[float]) -> int:
    """The timestep whose σ is nearest to `sigma` by logarithm, of the rising σ of all timesteps."""
    above = min(max(bisect_right(known, sigma), 1), len(known) - 1)
    low, high = log(known[above - 1]), log(known[above])
    return round(above - 1 + min(max((log(sigma) - low) / (high - low), 0.0), 1.0))


def promised_points(
    step_counts: Iterable[int],
    num_train_timesteps: int = 1000,
    grid: Callable[[int, int], Sequence[int]] = student_grid,
) -> list[int]:
    """Every timestep at which a student that promises `step_counts` will be asked, noisiest first, each once.

    Args:
        grid: the timesteps of its sampler, of a number of steps and T.
    """
    grids = (grid(steps, num_train_timesteps) for steps in step_counts)
    return sorted({t for grid in grids for t in grid}, reverse=True)


def rollout_grid(t: int, k: int, points: Iterable[int], num_train_timesteps: int = 1000) -> list[int]:
    """The k + 1 timesteps, strictly falling from `t` to −1 (x0), of a k-step rollout of the teacher.

    The student's `points` below t are knots. With steps to spare, the widest gap is halved (of equal ones the noisiest;
    half a timestep rounds to the noisier side) until there are k. With more knots than k − 1, they are thinned evenly.
    From 999 with k = 8 and the points of 1 2 4 8 steps this is the student's own 8-step grid.

    Raises:
        InputError: t is not a timestep, or there are fewer than k steps between t and x0.
    """
    if not 0 <= t < num_train_timesteps:
        raise InputError(f"timestep {t} does not exist; they are 0 to {num_train_timesteps - 1}; choose one of these")
    if not 1 <= k <= t + 1:
        raise InputError(
            f"the teacher cannot take {k} DDIM steps from t = {t}; it can take 1 to {t + 1}; "
            "set --num_ddim_steps accordingly, or promise fewer --num_inference_steps"
        )
    knots = [t, *sorted({p for p in points if 0 <= p < t}, reverse=True), -1]
    gaps = len(knots) - 1
    if gaps > k:
        return [knots[floor(i * gaps / k + 0.5)] for i in range(k + 1)]
    while len(knots) < k + 1:
        widths = [high - low for high, low in pairwise(knots)]
        widest = widths.index(max(widths))
        knots.insert(widest + 1, (knots[widest] + knots[widest + 1] + 1) // 2)
    return knots


def rollout_grids(points: Sequence[int], k: int, num_train_timesteps: int = 1000) -> dict[int, list[int]]:
    """`rollout_grid` of k steps from each of the student's `points`."""
    return {t: rollout_grid(t, k, points, num_train_timesteps) for t in points}

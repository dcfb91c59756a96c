"""Distances between two clean latents, one number a sample, weighted by the noise level.

The error is measured in x0 and scaled before the distance is taken: e = √w(t) · (prediction − target). For a given x_t
an error in x0 is a fixed multiple of the error in ε or in v (Salimans & Ho 2022, section 4), hence the names:

    x0   w = 1              the error in x0 itself; the default
    eps  w = ᾱ / (1 − ᾱ)    the error in ε: nearly nothing at the noisiest timestep
    v    w = 1 / (1 − ᾱ)    the error in v: the sum of the two, "SNR + 1"
    mid  w = √(ᾱ / (1 − ᾱ)) halfway between x0 and ε, their weights' geometric mean
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

LossName = Literal["mse", "huber"]
Weighting = Literal["x0", "eps", "v", "mid"]

HUBER_C = 0.001
"""Where pseudo-Huber turns from quadratic to linear; the value of LCM's training."""


def mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """mean e², [B] fp32, for latents [B, C, H, W] and weights [B]."""
    return _weighted_error(prediction, target, weight).square().mean(1)


def huber(prediction: Tensor, target: Tensor, weight: Tensor, c: float = HUBER_C) -> Tensor:
    """mean (√(e² + c²) − c), [B] fp32: pseudo-Huber, element by element (Song & Dhariwal 2024, section 3.3)."""
    return ((_weighted_error(prediction, target, weight).square() + c**2).sqrt() - c).mean(1)


def _weighted_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """e = √w · (prediction − target), [B, C·H·W] fp32."""
    return weight.sqrt()[:, None] * (prediction.float() - target.float()).flatten(1)


LOSSES: dict[LossName, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"mse": mse, "huber": huber}
"""The losses by the names that `--loss` takes."""

WEIGHTINGS: dict[Weighting, Callable[[Tensor], Tensor]] = {
    "x0": lambda alpha_bar: alpha_bar.new_ones(alpha_bar.shape),
    "eps": lambda alpha_bar: alpha_bar / (1 - alpha_bar),
    "v": lambda alpha_bar: 1 / (1 - alpha_bar),
    "mid": lambda alpha_bar: (alpha_bar / (1 - alpha_bar)).sqrt(),
}
"""w as a function of ᾱ [B], by the names that `--loss_weighting` takes."""

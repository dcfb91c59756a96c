"""The losses against loops that say the same more slowly, forward and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from fewstep.losses import HUBER_C, LOSSES, WEIGHTINGS, LossName, Weighting, huber, mse
from fewstep.schedule import NoiseSchedule


def naive(name: LossName, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    rows = []
    for p, g, w in zip(prediction, target, weight, strict=True):
        terms = []
        for a, b in zip(p.flatten(), g.flatten(), strict=True):
            squared = w * (a - b) ** 2
            terms.append(squared if name == "mse" else torch.sqrt(squared + HUBER_C**2) - HUBER_C)
        rows.append(sum(terms) / len(terms))
    return torch.stack(rows)


@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_gradient_are_those_of_the_loop(name: LossName) -> None:
    target, weight = torch.randn(3, 4, 2, 3), torch.tensor([0.1, 1.0, 30.0])
    quick = torch.randn(3, 4, 2, 3).requires_grad_()
    slow = quick.detach().double().requires_grad_()
    ours, theirs = LOSSES[name](quick, target, weight), naive(name, slow, target.double(), weight.double())
    assert ours.shape == (3,)
    assert ours.dtype == torch.float32
    assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    assert_close(quick.grad, slow.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_is_the_mse_of_what_it_is_named_after(weighting: Weighting, schedule: NoiseSchedule) -> None:
    x_t, output, other = torch.randn(3, 3, 4, 5, 5)
    t = torch.tensor([139, 499, 999])
    errors = {
        name: (convert(output, x_t, t) - convert(other, x_t, t)).square().mean((1, 2, 3))
        for name, convert in {"x0": schedule.to_x0, "eps": schedule.to_eps, "v": schedule.to_v}.items()
    }
    direct = (errors["x0"] * errors["eps"]).sqrt() if weighting == "mid" else errors[weighting]
    weight = WEIGHTINGS[weighting](schedule.alpha_bar(t))
    assert_close(
        mse(schedule.to_x0(output, x_t, t), schedule.to_x0(other, x_t, t), weight), direct, rtol=1e-4, atol=1e-6
    )


def test_huber_is_linear_far_out_and_harmless_at_zero() -> None:
    one = torch.ones(1)
    assert huber(torch.full((1, 4, 2, 2), 5.0), torch.zeros(1, 4, 2, 2), one).item() == pytest.approx(
        5 - HUBER_C, rel=1e-4
    )
    at_zero = torch.zeros(1, 4, 2, 2, requires_grad=True)
    loss = huber(at_zero, torch.zeros(1, 4, 2, 2), one)
    loss.sum().backward()
    assert loss.item() == 0
    assert at_zero.grad is not None
    assert torch.equal(at_zero.grad, torch.zeros_like(at_zero))
    assert huber(torch.full((1, 1, 1, 1), 3.0), torch.zeros(1, 1, 1, 1), one, c=4.0).item() == pytest.approx(
        math.hypot(3, 4) - 4
    )


def test_half_precision_is_lifted_before_the_difference() -> None:
    prediction = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    assert mse(prediction, -prediction, torch.ones(1)).item() == 360_000  # fp16 ends at 65,504

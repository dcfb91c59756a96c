"""A network that is small, smooth and different at every pixel, timestep and prompt; and the schedules to test with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.schedule import NoiseSchedule

SD15 = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


class ToyDenoiser(nn.Module):
    """Latents [B, 4, H, W], t int64 [B], prompts [B, L, 6] to a raw output [B, 4, H, W]; notes each forward's B."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.prompt = nn.Linear(6, 4)
        self.batches: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        assert t.shape == (len(x_t),)
        assert t.dtype == torch.int64
        assert (t >= 0).all()
        assert len(cond) == len(x_t)
        self.batches.append(len(x_t))
        scale = 1 + torch.cos(t.to(x_t.dtype) / 300)[:, None, None, None]
        return torch.tanh(self.conv(x_t) * scale + self.prompt(cond.mean(1))[:, :, None, None])


@pytest.fixture
def toy() -> ToyDenoiser:
    torch.manual_seed(1)
    return ToyDenoiser()


@pytest.fixture(params=["epsilon", "v_prediction"])
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    """Stable Diffusion 1.5's, once for each prediction type."""
    return NoiseSchedule.from_config(SD15, request.param)


@pytest.fixture
def sd15() -> dict[str, object]:
    """Stable Diffusion 1.5's scheduler config, as far as it matters here."""
    return dict(SD15)

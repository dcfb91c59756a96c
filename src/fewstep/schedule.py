"""The noise schedule: the one place that knows ᾱ, and the one place that knows eps from v from x0.

Throughout, a noised latent is x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε (DDPM, Ho et al. 2020, eq. 4), and t = −1 stands for the clean
latent: ᾱ_{−1} = 1. Nothing is ever clamped: latents of unit variance lie outside ±1 a third of the time, whatever
`clip_sample` a scheduler's configuration carries along.

Coefficients are fp32 and have one dimension too many to be demoted: latents in half precision are promoted by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fewstep.errors import InputError

PredictionType = Literal["epsilon", "v_prediction"]

SIGMA_DATA = 0.5
"""σ_data of the consistency boundary scalings, as in LCM and diffusers' LCMScheduler."""

TIMESTEP_SCALING = 10.0
"""By how much the boundary scalings stretch t, as in LCM and diffusers' LCMScheduler."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """ᾱ of every timestep and what the network predicts.

    `t` is everywhere an int64 tensor [B], or one int for the whole batch, on the schedule's device and in −1 … T−1.

    Attributes:
        alphas_cumprod: ᾱ, [T] fp32, falling from about 1 to about 0.
        prediction_type: what the network's raw output is.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    def __post_init__(self) -> None:
        """Refuse what cannot be inverted.

        Raises:
            InputError: another prediction type, ᾱ outside [0, 1], or epsilon at a terminal SNR of zero.
        """
        if self.prediction_type not in get_args(PredictionType):
            raise InputError(
                f"prediction_type {self.prediction_type!r} is not supported; it must be epsilon or v_prediction; "
                "pass --prediction_type if the checkpoint's scheduler config is wrong"
            )
        if not bool(((self.alphas_cumprod >= 0) & (self.alphas_cumprod <= 1)).all()):
            raise InputError(
                "the scheduler's betas give ᾱ outside [0, 1]; betas must be in [0, 1]; check trained_betas"
            )
        if self.prediction_type == "epsilon" and bool((self.alphas_cumprod == 0).any()):
            raise InputError(
                "epsilon prediction with zero terminal SNR (ᾱ_T = 0): at T the noise says nothing about x0; "
                "it needs v_prediction; pass --prediction_type v_prediction if the checkpoint was trained so"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], prediction_type: str | None = None) -> NoiseSchedule:
        """The schedule of a diffusers scheduler config.

        Args:
            config: `scheduler.config` or the content of `scheduler_config.json`; read are `num_train_timesteps`,
                `beta_schedule`, `beta_start`, `beta_end`, `trained_betas`, `rescale_betas_zero_snr`, `prediction_type`.
            prediction_type: overrules the one in `config`.

        Raises:
            InputError: what is there is unknown, incomplete, or refused by `NoiseSchedule`.
        """
        alphas_cumprod = (1 - _betas(config)).cumprod(0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        chosen = prediction_type or config.get("prediction_type") or "epsilon"
        return cls(alphas_cumprod, cast(PredictionType, chosen))  # __post_init__ checks what the cast asserts

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of timesteps; the noisiest is T − 1."""
        return self.alphas_cumprod.shape[0]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its table on `device`."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def alpha_bar(self, t: Tensor | int) -> Tensor:
        """ᾱ_t, fp32 in the shape of `t`; 1 where t is −1."""
        t = torch.as_tensor(t, device=self.alphas_cumprod.device)
        return torch.where(t < 0, 1.0, self.alphas_cumprod[t.clamp(min=0)])

    def _signal_and_noise(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1−ᾱ_t), each [B or 1, 1, 1, 1] for latents `like` [B, C, H, W]."""
        alpha_bar = self.alpha_bar(t).reshape(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x_t = √ᾱ_t x0 + √(1−ᾱ_t) ε, for x0 and ε [B, C, H, W]; at t = −1 it is x0."""
        signal, sigma = self._signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The clean latent [B, C, H, W] that the network's raw `output` at `x_t` stands for.

        epsilon: x0 = (x_t − √(1−ᾱ) ε) / √ᾱ (DDIM, Song et al. 2021, eq. 9);
        v: x0 = √ᾱ x_t − √(1−ᾱ) v (Salimans & Ho 2022, appendix D).
        """
        signal, sigma = self._signal_and_noise(t, x_t)
        if self.prediction_type == "v_prediction":
            return signal * x_t - sigma * output
        return (x_t - sigma * output) / signal

    def to_eps(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The noise [B, C, H, W] that the network's raw `output` at `x_t` stands for; v: ε = √ᾱ v + √(1−ᾱ) x_t."""
        if self.prediction_type == "v_prediction":
            signal, sigma = self._signal_and_noise(t, x_t)
            return signal * output + sigma * x_t
        return output

    def to_v(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The velocity v = √ᾱ ε − √(1−ᾱ) x0 [B, C, H, W] that the network's raw `output` at `x_t` stands for."""
        if self.prediction_type == "v_prediction":
            return output
        signal, sigma = self._signal_and_noise(t, x_t)
        return signal * output - sigma * self.to_x0(output, x_t, t)

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The raw output that a network which sees `x0` in `x_t` would give: the inverse of `to_x0` for t ≥ 0."""
        signal, sigma = self._signal_and_noise(t, x_t)
        eps = (x_t - signal * x0) / sigma
        return signal * eps - sigma * x0 if self.prediction_type == "v_prediction" else eps

    def jump_x0(self, x_t: Tensor, x_s: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """The x̂0 [B, C, H, W] with which one DDIM step from `x_t` at t arrives at `x_s` at s < t.

        x̂0 = (x_s − r x_t) / (√ᾱ_s − r √ᾱ_t) with r = √((1−ᾱ_s) / (1−ᾱ_t)): the target of progressive distillation
        (Salimans & Ho 2022, appendix G). At s = −1 it is x_s itself.
        """
        (signal_t, sigma_t), (signal_s, sigma_s) = self._signal_and_noise(t, x_t), self._signal_and_noise(s, x_s)
        r = sigma_s / sigma_t
        return (x_s - r * x_t) / (signal_s - r * signal_t)

    def boundary_scalings(self, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, fp32 in the shape of `t`: f(x, t) = c_skip x + c_out x̂0 is the identity at t = 0.

        With s = 10 t and σ = 0.5: c_skip = σ² / (s² + σ²), c_out = s / √(s² + σ²) (the scalings of LCM,
        Luo et al. 2023, eq. 9). From t = 139 on c_skip is below 1.3e−7: there f is x̂0.
        """
        scaled = torch.as_tensor(t, device=self.alphas_cumprod.device) * TIMESTEP_SCALING
        norm = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / norm, scaled / norm**0.5

    def consistency(self, output: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """f(x_t, t) = c_skip x_t + c_out x̂0 (LCM, eq. 9): what `LCMScheduler` calls `denoised`, [B, C, H, W]."""
        c_skip, c_out = (c.reshape(-1, *[1] * (x_t.ndim - 1)) for c in self.boundary_scalings(t))
        return c_out * self.to_x0(output, x_t, t) + c_skip * x_t


def _betas(config: Mapping[str, Any]) -> Tensor:
    """β of every timestep, [T] fp32, as diffusers' schedulers make them."""
    count = int(config.get("num_train_timesteps", 1000))
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float32)
        if betas.shape != (count,):
            raise InputError(
                f"trained_betas has shape {list(betas.shape)}; num_train_timesteps asks for [{count}]; "
                "make the two agree in the scheduler config"
            )
        return betas
    name = config.get("beta_schedule")
    if name == "squaredcos_cap_v2":
        return _cosine_betas(count)
    if name not in ("linear", "scaled_linear"):
        raise InputError(
            f"beta_schedule {name!r} is not supported; it must be linear, scaled_linear or squaredcos_cap_v2; "
            "other schedules can be given as trained_betas"
        )
    if "beta_start" not in config or "beta_end" not in config:
        raise InputError(f"the scheduler config has no beta_start or no beta_end; {name} needs both; add them")
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if name == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2


def _cosine_betas(count: int) -> Tensor:
    """The cosine schedule: ᾱ(u) = cos²((u + 0.008) / 1.008 · π/2), β at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float32).clamp(max=0.999)


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """√ᾱ shifted to 0 at T−1 and scaled back to what it was at 0 (Lin et al. 2024, algorithm 1), [T] fp32."""
    signal = alphas_cumprod.sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2

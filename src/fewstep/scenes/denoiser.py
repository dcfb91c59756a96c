"""The second half of the embedded base: the UNet, trained on latents and on a text encoder that is ready."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel

from fewstep.scenes.landmarks import LandmarkHeads
from fewstep.scenes.layout import SIZE
from fewstep.schedule import NoiseSchedule

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
"""Stable Diffusion 1.5's noise schedule, as diffusers writes it."""

CAPTION_DROPOUT = 0.1
SNR_FLOOR, SNR_CAP = 1.0, 5.0
LANDMARK_WEIGHT = 0.1
ENCODED_AT_ONCE = 4

SIZES: dict[str, dict[str, object]] = {
    "full": {"block_out_channels": (48, 80, 128), "layers_per_block": 1, "norm_num_groups": 16},
    "tiny": {"block_out_channels": (16, 16, 32), "layers_per_block": 1, "norm_num_groups": 8},
}


def build_unet(size: str, cross_attention_dim: int) -> UNet2DConditionModel:
    """An untrained UNet for 16 × 16 × 4 latents with cross-attention at every level."""
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=4,
        cross_attention_dim=cross_attention_dim,
        **SIZES[size],
    )


class Denoiser(nn.Module):
    """A frozen text encoder and the UNet that is trained on what it says, as Stable Diffusion's is on CLIP's."""

    def __init__(self, text_encoder: CLIPTextModel, size: str) -> None:
        super().__init__()
        self.text_encoder = text_encoder.requires_grad_(False)
        self.unet = build_unet(size, self.text_encoder.config.hidden_size)
        self.landmarks = LandmarkHeads(self.unet)

    def use_plain_attention(self, plain: bool) -> None:
        """Attention as two matrix products instead of the fused kernel.

        On CPUs the fused kernel's bf16 backward pass takes as long as all the rest of the step (torch 2.13).
        """
        self.unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())

    def forward(self, noisy: Tensor, t: Tensor, input_ids: Tensor) -> Tensor:
        """Predicted noise for latents [B, 4, 16, 16], timesteps [B] and tokens [B, L]."""
        with torch.no_grad():
            conditioning = self.text_encoder(input_ids).last_hidden_state
        prediction: Tensor = self.unet(noisy, t, conditioning).sample
        return prediction


def denoiser_losses(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    input_ids: Tensor,
    landmarks: list[Tensor] | None = None,
    asked: Tensor | None = None,
) -> dict[str, Tensor]:
    """Noise-prediction loss, weighted as an error in x0 is by SNR between 1 and 5: min(max(SNR, 1), 5) / SNR.

    The cap is Min-SNR's (Hang et al. 2023, eq. 9); the floor is truncated SNR's (Salimans & Ho 2022, section 4).
    Without the floor the noisiest timesteps, where it is settled what stands where and how many there are, weigh next
    to nothing: an x0 that is off by 1 is at t = 999 an error of 0.07 in the noise.

    Args:
        latents, noise: [B, 4, 16, 16]; t: int64 [B]; input_ids: [B, L], dropped captions already replaced.
        landmarks: the pictures' standardised maps, level by level; None leaves that loss out.
        asked: bool [B], False where the caption was dropped.
    """
    prediction = denoiser(schedule.add_noise(latents, noise, t), t, input_ids).float()
    error = (prediction - noise).square().mean((1, 2, 3))
    alpha_bar = schedule.alpha_bar(t)
    snr = alpha_bar / (1 - alpha_bar)
    denoising = (snr.clamp(SNR_FLOOR, SNR_CAP) / snr * error).mean()
    losses = {"loss": denoising, "denoising": denoising, "eps_mse": error.detach().mean()}
    if landmarks is not None and asked is not None:
        losses["landmarks"] = denoiser.landmarks.loss(landmarks, asked)
        losses["loss"] = denoising + LANDMARK_WEIGHT * losses["landmarks"]
    return losses


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Posterior means [B, 4, 16, 16], on the CPU, of pixels [B, 3, 128, 128] in −1…1.

    A few pictures at a time on a CPU: twice as fast as 64 in one forward, whose activations leave its caches.
    """
    parts = pixels.split(ENCODED_AT_ONCE if vae.device.type == "cpu" else len(pixels))
    return torch.cat([vae.encode(some.to(vae.device)).latent_dist.mean.float().cpu() for some in parts])

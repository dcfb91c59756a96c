"""The second half of the embedded base: the UNet and its text encoder, trained together on latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from fewstep.scenes.layout import SIZE
from fewstep.scenes.text import MAX_TOKENS, build_text_encoder
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
SNR_CAP = 5.0

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
    """Text encoder and UNet as one trainable module."""

    def __init__(self, tokenizer: CLIPTokenizer, size: str) -> None:
        super().__init__()
        self.text_encoder: CLIPTextModel = build_text_encoder(tokenizer, size)
        self.unet = build_unet(size, self.text_encoder.config.hidden_size)

    def use_plain_attention(self, plain: bool) -> None:
        """Attention as two matrix products instead of the fused kernel.

        On CPUs the fused kernel's bf16 backward pass takes as long as all the rest of the step (torch 2.13).
        """
        self.unet.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())

    def forward(self, noisy: Tensor, t: Tensor, input_ids: Tensor) -> Tensor:
        """Predicted noise for latents [B, 4, 16, 16], timesteps [B] and tokens [B, L]."""
        conditioning = self.text_encoder(input_ids).last_hidden_state
        prediction: Tensor = self.unet(noisy, t, conditioning).sample
        return prediction


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, L], padded and cut to the base's context as a pipeline does it."""
    tokens = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids


def denoiser_losses(
    denoiser: Denoiser, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, t: Tensor, input_ids: Tensor
) -> dict[str, Tensor]:
    """Noise-prediction loss with Min-SNR weighting (Hang et al. 2023, eq. 9: min(SNR, 5) / SNR).

    Args:
        latents, noise: [B, 4, 16, 16]; t: int64 [B]; input_ids: [B, L], dropped captions already replaced.
    """
    prediction = denoiser(schedule.add_noise(latents, noise, t), t, input_ids).float()
    error = (prediction - noise).square().mean((1, 2, 3))
    alpha_bar = schedule.alpha_bar(t)
    snr = alpha_bar / (1 - alpha_bar)
    weight = snr.clamp(max=SNR_CAP) / snr
    return {"loss": (weight * error).mean(), "eps_mse": error.detach().mean()}


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Posterior means [B, 4, 16, 16] of pixels [B, 3, 128, 128] in −1…1."""
    latents: Tensor = vae.encode(pixels).latent_dist.mean.float()
    return latents

"""A base with random weights: Stable Diffusion 1.5's own architecture, or one so small that a test can train it."""

from __future__ import annotations

from typing import Any, Literal

import torch

from .. import sd15
from ..quiet import quiet_libraries
from ..schedule import NoiseSchedule
from .base import Backbone
from .fingerprint import of_text
from .loading import choose_device, choose_dtype

Size = Literal["sd15", "tiny"]

TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
    },
    "vae": {"sample_size": 64, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
    "scheduler": {},
}
"""What the tiny base changes in Stable Diffusion 1.5's configurations; pictures are 64 x 64."""


def configs(size: Size) -> dict[str, dict[str, Any]]:
    """The configurations of unet, vae, text_encoder and scheduler at `size`."""
    return {part: sd15.config(part) | (TINY[part] if size == "tiny" else {}) for part in TINY}


def random_backbone(
    size: Size = "tiny",
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "no",
    prediction_type: str | None = None,
) -> Backbone:
    """A base with random weights, the same for the same seed, and CLIP's own tokenizer.

    Args:
        size: "sd15" for Stable Diffusion 1.5's architecture (1.07 billion parameters), "tiny" for tests.
        seed: of the weights; the caller's random state is left alone.
        device: "meta" too, for shapes without memory.
        dtype: as for `load_backbone`.
        prediction_type: in place of epsilon.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = configs(size)
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    born = torch.device("meta" if place.type == "meta" else "cpu")  # on the CPU the same numbers for every device
    with quiet_libraries(), torch.random.fork_rng(devices=[]), born:
        torch.manual_seed(seed)
        unet = UNet2DConditionModel.from_config(parts["unet"]).to(place, precision)
        vae = AutoencoderKL.from_config(parts["vae"]).to(place, precision)
        text_encoder = CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])).to(place, precision)
    schedule = NoiseSchedule.from_config(parts["scheduler"], prediction_type)
    described = f"random {size} base, seed {seed}, {schedule.prediction_type}"
    return Backbone(
        name=described,
        why="made for a test",
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=sd15.tokenizer(),
        scheduler_config=parts["scheduler"] | {"prediction_type": schedule.prediction_type},
        schedule=schedule if born.type == "meta" else schedule.to(place),
        device=place,
        dtype=precision,
        guidance_scale=7.5,
        resolution=int(parts["unet"]["sample_size"]) * 8,
        teacher_steps=50,
        abilities=None,
        fingerprint=of_text(described),
    )

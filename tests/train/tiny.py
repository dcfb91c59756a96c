"""A whole Stable-Diffusion-shaped base of a few hundred thousand random weights, and pictures to train it with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

RESOLUTION = 64
"""Pictures are 64x64, latents 4x8x8."""


def _tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with a byte vocabulary: 256 bytes, each also as an end of word, and the two specials."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    assert len(tokenizer) == len(tokens) == 514
    tokenizer.save_pretrained(folder)


def make_base(folder: Path, *, prediction_type: str = "epsilon") -> Path:
    """Write a diffusers folder with tiny random parts that a stock StableDiffusionPipeline opens and draws with."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=RESOLUTION,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    _tokenizer(folder / "tokenizer")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    (folder / "fewstep.json").write_text(json.dumps({"guidance_scale": 3.0, "teacher_steps": 4}))
    return folder


def make_pictures(folder: Path, count: int = 12) -> Path:
    """Write `count` pictures with a caption file of the same stem beside each."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    for number in range(count):
        coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"pattern number {number}")
    return folder

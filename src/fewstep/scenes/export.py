"""Writes the embedded base as it is shipped: a diffusers folder in fp16 that stock libraries open."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler
from torch import nn
from transformers import CLIPTokenizer

from fewstep.files import write_text_atomic
from fewstep.quiet import quiet_libraries
from fewstep.scenes.denoiser import Denoiser
from fewstep.scenes.layout import SIZE
from fewstep.scenes.text import forget_last_call


def _halved(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).half()


def save_base(
    vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer, scheduler: dict[str, Any], folder: Path
) -> None:
    """A diffusers folder that `StableDiffusionPipeline.from_pretrained` opens and draws with, nothing else given."""
    forget_last_call(tokenizer)
    with quiet_libraries():
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=_halved(vae),
            text_encoder=_halved(denoiser.text_encoder),
            tokenizer=tokenizer,
            unet=_halved(denoiser.unet),
            scheduler=DDIMScheduler.from_config(scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder, safe_serialization=True)
    # transformers loads in the dtype that config.json names, diffusers in fp32: without this the pipeline would
    # open and then fail on its first call, half in fp16.
    _edit(folder / "text_encoder" / "config.json", drop="torch_dtype", dtype="float32")
    # Where the VAE was loaded from is nobody's business.
    _edit(folder / "vae" / "config.json", drop="_name_or_path")


def _edit(config: Path, *, drop: str, **changes: str) -> None:
    """A JSON configuration with one entry dropped and others set."""
    values = json.loads(config.read_text())
    values.pop(drop, None)
    write_text_atomic(config, json.dumps(values | changes, indent=2) + "\n")


def save_defaults(folder: Path, *, guidance_scale: float, teacher_steps: int) -> None:
    """`fewstep.json`: what guidance, resolution and teacher steps mean when left unset, and whose abilities it has."""
    defaults = {
        "abilities": "scenes",
        "guidance_scale": guidance_scale,
        "resolution": SIZE,
        "teacher_steps": teacher_steps,
    }
    write_text_atomic(folder / "fewstep.json", json.dumps(defaults, indent=2) + "\n")

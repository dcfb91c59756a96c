"""The latents of all training drawings, computed once for both stages of the UNet."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.pretrain.workshop import Workshop
from fewstep.scenes.denoiser import latents_of
from fewstep.scenes.drawings import drawn_in_chunks
from fewstep.scenes.vae import to_pixels


def cached_latents(shop: Workshop, vae: AutoencoderKL) -> Tensor:
    """Latents of the drawings that the UNet is trained on, computed once: fp16 [N, 4, 16, 16]."""
    file, count = shop.work / "latents.safetensors", shop.sizes.latents
    if not file.exists():
        chunks = []
        with shop.reporter.progress("latents", count) as bar, shop.autocast():
            for pixels in drawn_in_chunks(shop.train_seed, count):
                chunks.append(latents_of(vae, to_pixels(pixels)).half())
                bar.advance(len(pixels))
        save_file({"latents": torch.cat(chunks).contiguous()}, file)
    return load_file(file)["latents"]

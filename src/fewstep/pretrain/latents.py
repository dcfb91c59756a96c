"""The latents of all training drawings, computed once for both stages of the UNet."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fewstep.files import read_whole, sha256, write_tensors_atomic
from fewstep.pretrain.workshop import Workshop
from fewstep.scenes.denoiser import latents_of
from fewstep.scenes.drawings import drawn_in_chunks
from fewstep.scenes.vae import to_pixels

_AGAIN = "remove it, and they are computed again"


def cached_latents(shop: Workshop, vae: AutoencoderKL) -> Tensor:
    """Latents of the drawings that the UNet is trained on, computed once for each VAE: fp16 [N, 4, 16, 16]."""
    file, count = shop.work / "latents.safetensors", shop.sizes.latents
    maker = sha256(shop.folded / "diffusion_pytorch_model.safetensors")
    if _maker(file) != maker:
        chunks = []
        with shop.reporter.progress("latents", count) as bar, shop.autocast():
            for pixels in drawn_in_chunks(shop.train_seed, count):
                chunks.append(latents_of(vae, to_pixels(pixels)).half())
                bar.advance(len(pixels))
        write_tensors_atomic(file, {"latents": torch.cat(chunks)}, {"vae": maker})
    with read_whole(file, _AGAIN):
        return load_file(file)["latents"]


def _maker(file: Path) -> str | None:
    """The hash of the VAE that the latents in `file` are of, where that is known."""
    if not file.exists():
        return None
    with read_whole(file, _AGAIN), safe_open(file, "pt") as saved:
        return (saved.metadata() or {}).get("vae")

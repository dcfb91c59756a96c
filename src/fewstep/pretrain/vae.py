"""Stage 1: the VAE, from drawings to latents and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.pretrain.workshop import Workshop
from fewstep.randomness import generator
from fewstep.scenes import measure
from fewstep.scenes.denoiser import latents_of
from fewstep.scenes.drawings import drawn_pixels
from fewstep.scenes.loop import batch_indices
from fewstep.scenes.vae import build_vae, fold_latent_statistics, to_pixels, vae_losses


def train_vae(shop: Workshop) -> dict[str, Any]:
    """Train it, and fold the statistics of its latents into it: every channel has mean 0 and std 1 then."""
    pixels, plan = shop.drawings(), shop.plan("vae")
    torch.manual_seed(shop.seed)
    vae = build_vae(shop.size)

    def make(step: int, part: int) -> tuple[Tensor, Tensor]:
        picked = batch_indices(shop.seed, step, plan.batch_size, len(pixels)).chunk(plan.parts)[part]
        batch = to_pixels(pixels[picked.numpy()])
        if step % 2:  # a mirrored landscape is as good
            batch = batch.flip(-1)
        noise = torch.randn(len(picked), 4, 16, 16, generator=generator(shop.seed, "posterior", step, part))
        return batch, noise

    shop.run(vae, make, partial(vae_losses, vae), plan, "vae")
    # In fp32 whatever it was trained in: run again, the stage leaves the same VAE, and latents of it stay good.
    latents = latents_of(vae, to_pixels(pixels[:1024]))
    vae = fold_latent_statistics(vae.cpu(), latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    shop.leave(shop.folded, vae.save_pretrained)
    test = drawn_pixels(shop.test_seed, shop.sizes.tested)
    return {"psnr_db": measure.psnr(vae, test), "latent_std": latents.std((0, 2, 3)).tolist()}

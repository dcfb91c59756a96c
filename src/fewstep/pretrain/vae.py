"""The VAE, from drawings to latents and back, in two stages."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.pretrain.workshop import Workshop
from fewstep.randomness import generator
from fewstep.scenes import measure
from fewstep.scenes.denoiser import latents_of
from fewstep.scenes.drawings import drawn_pixels
from fewstep.scenes.loop import averaged, batch_indices
from fewstep.scenes.vae import build_vae, fold_latent_statistics, to_pixels, vae_losses


def train_vae(shop: Workshop) -> dict[str, Any]:
    """From nothing, down a first learning-rate curve."""
    torch.manual_seed(shop.seed)
    vae = _train(shop, build_vae(shop.size), "vae", shop.seed, after=())
    return _measure(shop, vae)


def refine_vae(shop: Workshop) -> dict[str, Any]:
    """Go on from the averaged weights down a second curve, with fresh moments and other batches; then fold the latents'
    statistics into it: every channel has mean 0 and std 1 then."""
    vae = build_vae(shop.size)
    vae.load_state_dict(averaged(shop.work / "vae", shop.plan("vae").steps))
    vae = _train(shop, vae, "vae-refine", shop.seed + 1, after=("vae",))
    # In fp32 whatever it was trained in: run again, the stage leaves the same VAE, and latents of it stay good.
    latents = latents_of(vae, to_pixels(shop.drawings()[:1024]))
    vae = fold_latent_statistics(vae.cpu(), latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    shop.leave(shop.folded, vae.save_pretrained)
    return _measure(shop, vae) | {"latent_std": latents.std((0, 2, 3)).tolist()}


def _train(shop: Workshop, vae: AutoencoderKL, name: str, seed: int, after: tuple[str, ...]) -> AutoencoderKL:
    pixels, plan = shop.drawings(), shop.plan("vae")

    def make(step: int, part: int) -> tuple[Tensor, Tensor]:
        picked = batch_indices(seed, step, plan.batch_size, len(pixels)).chunk(plan.parts)[part]
        batch = to_pixels(pixels[picked.numpy()])
        if step % 2:  # a mirrored landscape is as good
            batch = batch.flip(-1)
        noise = torch.randn(len(picked), 4, 16, 16, generator=generator(seed, "posterior", step, part))
        return batch, noise

    shop.run(vae, make, partial(vae_losses, vae), plan, name, after=after)
    return vae


def _measure(shop: Workshop, vae: AutoencoderKL) -> dict[str, Any]:
    return {"psnr_db": measure.psnr(vae, drawn_pixels(shop.test_seed, shop.sizes.tested))}

"""The text encoder, then the UNet on cached latents: two runs of one objective, each in two stages."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel

from fewstep.pretrain.figures import GUIDANCE, fresh_loss, prove
from fewstep.pretrain.latents import cached_latents
from fewstep.pretrain.workshop import Workshop
from fewstep.randomness import generator
from fewstep.scenes.attributes import sample_attributes
from fewstep.scenes.captions import random_caption
from fewstep.scenes.denoiser import CAPTION_DROPOUT, SCHEDULER, Denoiser, denoiser_losses
from fewstep.scenes.export import save_base, save_defaults
from fewstep.scenes.landmarks import numbered_landmarks, standardised_levels
from fewstep.scenes.loop import averaged, batch_indices, steps_done
from fewstep.scenes.text import CaptionReader, caption_losses, tokenize
from fewstep.schedule import NoiseSchedule


def half_of_denoiser(shop: Workshop) -> dict[str, Any]:
    """As far as half of `train_denoiser`, which goes on from there."""
    until = shop.plan("denoiser").steps // 2
    _drawing(shop, until)
    return {"steps": until}


def train_denoiser(shop: Workshop) -> dict[str, Any]:
    """The text encoder learns to read, then the UNet to draw what it has read."""
    return fresh_loss(shop, _drawing(shop))


def half_of_refine(shop: Workshop) -> dict[str, Any]:
    """As far as half of `refine_denoiser`, which goes on from there."""
    until = shop.plan("refine").steps // 2
    _refined(shop, until)
    return {"steps": until}


def refine_denoiser(shop: Workshop) -> dict[str, Any]:
    """Go on from the averaged weights with fresh moments, other batches and noise; then measure the base."""
    denoiser, vae = _refined(shop), shop.load_vae()
    denoiser.landmarks.detach()

    def save(folder: Path) -> None:
        save_base(vae.cpu(), denoiser.cpu(), shop.tokenizer, SCHEDULER, folder)
        save_defaults(folder, guidance_scale=GUIDANCE, teacher_steps=50)

    shop.leave(shop.out / "base", save)
    return fresh_loss(shop, denoiser) | prove(shop)


def _drawing(shop: Workshop, until: int | None = None) -> Denoiser:
    vae = shop.load_vae()  # missing, it is missed before anything long
    denoiser = _untrained_denoiser(shop, _train_text(shop))
    _train_unet(shop, denoiser, vae, "denoiser", shop.seed, until, after=("vae-refine", "text"))
    return denoiser


def _refined(shop: Workshop, until: int | None = None) -> Denoiser:
    vae = shop.load_vae()
    shop.need_judges()  # which measure the base when it is trained
    denoiser = _untrained_denoiser(shop, CaptionReader(shop.tokenizer, shop.size).text_encoder)
    denoiser.load_state_dict(averaged(shop.work / "denoiser", shop.plan("denoiser").steps))
    _train_unet(shop, denoiser, vae, "refine", shop.seed + 1, until, after=("vae-refine", "denoiser"))
    return denoiser


def _untrained_denoiser(shop: Workshop, text_encoder: CLIPTextModel) -> Denoiser:
    torch.manual_seed(shop.seed)
    return Denoiser(text_encoder, shop.size)


def _train_unet(
    shop: Workshop,
    denoiser: Denoiser,
    vae: AutoencoderKL,
    name: str,
    seed: int,
    until: int | None,
    after: tuple[str, ...],
) -> None:
    latents, plan = cached_latents(shop, vae), shop.plan(name)
    landmarks: list[Tensor] = []
    if steps_done(shop.work / name) < (plan.steps if until is None else until):
        shop.reporter.say(f"landmarks of {len(latents)} drawings")
        landmarks = standardised_levels(numbered_landmarks(shop.train_seed, len(latents)))
    schedule = NoiseSchedule.from_config(SCHEDULER).to(shop.device)
    denoiser.use_plain_attention(shop.fast and shop.device.type == "cpu")

    def make(step: int, part: int) -> tuple[Any, ...]:
        picked = batch_indices(seed, step, plan.batch_size, len(latents)).chunk(plan.parts)[part]
        random = generator(seed, "denoiser", step, part)
        noise = torch.randn(len(picked), *latents.shape[1:], generator=random)
        t = torch.randint(schedule.num_train_timesteps, (len(picked),), generator=random)
        dropped = torch.rand(len(picked), generator=random) < CAPTION_DROPOUT
        captions = shop.captions(step, picked.tolist())
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
        clean, ids = latents[picked].float(), tokenize(shop.tokenizer, captions)
        return clean, noise, t, ids, [level[picked] for level in landmarks], ~dropped

    shop.run(denoiser, make, partial(denoiser_losses, denoiser, schedule), plan, name, until, after)
    denoiser.use_plain_attention(False)


def _train_text(shop: Workshop) -> CLIPTextModel:
    """A text encoder whose end-of-text state says every attribute of its caption."""
    plan = shop.plan("text")
    torch.manual_seed(shop.seed)
    reader = CaptionReader(shop.tokenizer, shop.size)

    def make(step: int, _part: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((shop.seed, step, 6))
        drawn = [sample_attributes(rng) for _ in range(plan.batch_size)]
        ids = tokenize(shop.tokenizer, [random_caption(rng, attributes) for attributes in drawn])
        return ids, torch.tensor([attributes.indices() for attributes in drawn])

    shop.run(reader, make, partial(caption_losses, reader), plan, "text")
    return reader.text_encoder

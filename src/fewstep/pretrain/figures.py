"""What a finished base can do: whether it overfits, and what its teacher and its untrained few steps draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fewstep.backbone import load_backbone
from fewstep.pretrain.latents import cached_latents
from fewstep.pretrain.workshop import Workshop
from fewstep.proving import draw_arm, prove_base, untrained_arm
from fewstep.randomness import generator
from fewstep.scenes.abilities import SceneAbilities
from fewstep.scenes.captions import random_caption
from fewstep.scenes.denoiser import SCHEDULER, Denoiser, denoiser_losses, latents_of
from fewstep.scenes.drawings import numbered_attributes, numbered_drawing
from fewstep.scenes.text import tokenize
from fewstep.scenes.vae import to_pixels
from fewstep.schedule import NoiseSchedule

GUIDANCE = 4.0
"""The teacher's default: the strongest that still gets about as much right as the best of GUIDANCES. It costs some
distance to real pictures, as Stable Diffusion's 7.5 does, and is what few steps without training cannot follow."""

GUIDANCES = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
"""What the figures compare it with."""


def fresh_loss(shop: Workshop, denoiser: Denoiser) -> dict[str, Any]:
    """Overfitting: the loss on drawings never trained on over that on trained ones, same noise and timesteps."""
    vae = shop.load_vae()
    latents = cached_latents(shop, vae)
    count = min(1024, len(latents), shop.sizes.tested)
    denoiser.to(shop.device)
    schedule = NoiseSchedule.from_config(SCHEDULER).to(shop.device)
    random = generator(shop.seed, "fresh")
    noise = torch.randn(count, *latents.shape[1:], generator=random)
    t = torch.randint(schedule.num_train_timesteps, (count,), generator=random)
    fresh = [numbered_drawing(shop.test_seed, index) for index in range(count)]
    with torch.no_grad(), shop.autocast():
        drawn = to_pixels(np.stack([drawing.pixels for drawing in fresh]))
        unseen = latents_of(vae, drawn)
    seen = [numbered_attributes(shop.train_seed, index) for index in range(count)]
    sums = {"trained": 0.0, "fresh": 0.0}
    for name, rows, attributes in (
        ("trained", latents[:count].float(), seen),
        ("fresh", unseen, [drawing.attributes for drawing in fresh]),
    ):
        rng = np.random.default_rng((shop.seed, 5))
        ids = tokenize(shop.tokenizer, [random_caption(rng, one) for one in attributes])
        for i in range(0, count, 64):
            x0, eps, at, words = (part[i : i + 64].to(shop.device) for part in (rows, noise, t, ids))
            with torch.no_grad():
                losses = denoiser_losses(denoiser, schedule, x0, eps, at, words)
            sums[name] += float(losses["denoising"]) * len(at) / count
    return {"loss": sums, "fresh_over_trained": round(sums["fresh"] / sums["trained"], 4)}


def prove(shop: Workshop) -> dict[str, Any]:
    """Measure the base at the teacher's guidance and beside others."""
    abilities, sizes, seed = SceneAbilities(shop.out), shop.sizes, shop.test_seed
    base = load_backbone(str(shop.out / "base"), device=shop.settings.device, dtype="no")
    some = abilities.prompts(sizes.swept, seed + 1)
    sweep = {
        guidance: draw_arm(base, untrained_arm("dpmpp", 16, guidance), some, seed, reporter=shop.reporter).share
        for guidance in GUIDANCES
    }
    proved = prove_base(
        base,
        abilities.prompts(sizes.proved, seed),
        abilities.prompts(sizes.proved, seed, "composed"),
        seed=seed,
        reporter=shop.reporter,
    )
    return {"all_right_by_guidance": {str(guidance): share for guidance, share in sweep.items()}} | proved

"""The judges: whoever looks at pictures, trained on drawings and reconstructions of drawings, never on drawn ones."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.files import read_whole
from fewstep.pretrain.workshop import Workshop
from fewstep.randomness import generator
from fewstep.scenes import measure
from fewstep.scenes.alignment import alignment_losses, build_alignment_model, save_alignment_model
from fewstep.scenes.drawings import flawed_drawings, numbered_drawing
from fewstep.scenes.judge import CLASSES, SOFTNESS, Judge, judge_losses, labels, save_judge, soften, whiten_features
from fewstep.scenes.layout import FLAWS, Flaw, parameters
from fewstep.scenes.loop import batch_indices
from fewstep.scenes.vae import to_pixels

WHITENED = 4_096
"""Drawings over which the judge's features are made uncorrelated with variance 1."""


def train_judges(shop: Workshop) -> dict[str, Any]:
    """The reader with its features, then the alignment model."""
    vae = shop.load_vae()
    figures = _train_judge(shop, vae)
    return figures | _train_alignment(shop)


def _train_judge(shop: Workshop, vae: AutoencoderKL) -> dict[str, Any]:
    sizes, plan = shop.sizes, shop.plan("judge")
    total = sizes.drawings + sizes.flawed
    drawn: list[Flaw | None] = [None] * sizes.drawings
    drawn += [FLAWS[i % len(FLAWS)] for i in range(sizes.flawed)]
    with shop.reporter.progress("labels", total) as bar:
        examples = []
        pixels = np.empty((total, 128, 128, 3), np.uint8)
        for index, drawing in enumerate(flawed_drawings(shop.train_seed, drawn)):
            pixels[index] = drawing.pixels
            examples.append((labels(drawing), parameters(drawing.attributes, drawing.layout)))
            bar.advance()
    targets = {name: torch.tensor([label[name] for label, _ in examples]) for name in CLASSES}
    numbers = torch.from_numpy(np.stack([numbers for _, numbers in examples]))
    known = numbers.isfinite()
    centre = numbers.nan_to_num().sum(0) / known.sum(0)
    spread = ((numbers - centre).nan_to_num().square().sum(0) / known.sum(0)).sqrt().clamp(min=1e-3)
    # Pictures beyond `total` are reconstructions of an even spread of those before.
    source = torch.linspace(0, total - 1, sizes.reconstructed).long()
    with shop.autocast():
        rebuilt = measure.reconstruct(vae, pixels[source.numpy()])
    everything = np.concatenate([pixels, rebuilt])
    origin = torch.cat([torch.arange(total), source])
    torch.manual_seed(shop.seed)
    judge = Judge(shop.size, numbers.shape[1] + SOFTNESS)

    def make(step: int, part: int) -> tuple[Any, ...]:
        picked = batch_indices(shop.seed, step, plan.batch_size, len(everything)).chunk(plan.parts)[part]
        picked = picked.sort().values
        random = generator(shop.seed, "soften", step, part)
        soft = torch.rand(len(picked), generator=random) < 0.4
        sigma = torch.rand(len(picked), generator=random) * 1.6 * soft
        contrast = 1 + (torch.rand(len(picked), generator=random) - 0.5) * 0.4 * soft
        rows = origin[picked]
        # A reconstruction's own blur is unknown: its sharpness is not regressed.
        sharpness = torch.where(picked < total, (sigma - 0.3) / 0.5, torch.nan)
        softness = torch.stack([sharpness, (contrast - 1) / 0.07], 1)
        wanted = torch.cat([(numbers[rows] - centre) / spread, softness], 1)
        asked = {name: values[rows] for name, values in targets.items()}
        return torch.from_numpy(everything[picked.numpy()]), sigma, contrast, asked, wanted

    def loss(
        batch: Tensor, sigma: Tensor, contrast: Tensor, asked: dict[str, Tensor], wanted: Tensor
    ) -> dict[str, Tensor]:
        softened = soften(batch.permute(0, 3, 1, 2).float() / 255, sigma, contrast)
        return judge_losses(judge, softened, asked, wanted)

    shop.run(judge, make, loss, plan, "judge", after=("vae-refine",))
    judge.cpu()
    real = to_pixels(pixels[: min(sizes.drawings, WHITENED)])
    whiten_features(judge, torch.cat([judge((some + 1) / 2)[1] for some in real.split(64)]))
    shop.leave(shop.out / "judge", partial(save_judge, judge, shop.size))
    test = [numbered_drawing(shop.test_seed, index, "unseen") for index in range(sizes.tested)]
    kinds = [FLAWS[i % len(FLAWS)] for i in range(sizes.tested_flawed)]
    flawed = list(flawed_drawings(shop.test_seed, kinds))
    return measure.reading(judge, vae, test) | measure.flaws_seen(judge, flawed, kinds)


def _train_alignment(shop: Workshop) -> dict[str, Any]:
    plan = shop.plan("alignment")
    pixels = shop.drawings()
    torch.manual_seed(shop.seed)
    model = build_alignment_model(shop.tokenizer, shop.size)

    def make(step: int, _part: int) -> tuple[Tensor, ...]:
        picked = batch_indices(shop.seed + 1, step, plan.batch_size, len(pixels)).sort().values.tolist()
        tokens = shop.tokenizer(shop.captions(step, picked), padding=True, return_tensors="pt")
        return to_pixels(pixels[picked]), tokens.input_ids, tokens.attention_mask

    shop.run(model, make, partial(alignment_losses, model), plan, "alignment")
    shop.leave(shop.out / "alignment", partial(save_alignment_model, model.cpu(), shop.tokenizer))
    curve = shop.work / "alignment" / "curve.jsonl"
    with read_whole(curve, "remove its folder, and the stage trains the alignment model from its start"):
        return {"alignment_loss": json.loads(curve.read_text().splitlines()[-1])["loss"]}

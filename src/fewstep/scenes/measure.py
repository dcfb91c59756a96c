"""What VAE and judge can do, measured on drawings that no stage was trained on."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.scenes.attributes import VALUES
from fewstep.scenes.drawings import Drawing
from fewstep.scenes.judge import CLASSES, COUNTED, Judge, answers, labels, read
from fewstep.scenes.layout import Flaw
from fewstep.scenes.vae import to_pixels

BATCH = 32


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, 128, 128, 3] through the VAE and back, as uint8."""
    done = []
    for first in range(0, len(pixels), BATCH):
        latents = vae.encode(to_pixels(pixels[first : first + BATCH]).to(vae.device)).latent_dist.mean
        rebuilt = vae.decode(latents).sample.float()
        done.append(((rebuilt.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(done)


def psnr(vae: AutoencoderKL, pixels: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of the reconstructions, in dB, picture by picture."""
    error = (reconstruct(vae, pixels).astype(np.float64) - pixels) / 255
    return float(np.mean(-10 * np.log10(np.square(error).mean((1, 2, 3)))))


def read_all(judge: Judge, pixels: np.ndarray) -> dict[str, Tensor]:
    """The judge's reading of pictures uint8 [N, 128, 128, 3]: int64 [N] by head."""
    readings = [read(judge((to_pixels(pixels[i : i + BATCH]) + 1) / 2)[0]) for i in range(0, len(pixels), BATCH)]
    return {name: torch.cat([reading[name] for reading in readings]) for name in CLASSES}


def reading(judge: Judge, vae: AutoencoderKL, drawings: list[Drawing]) -> dict[str, object]:
    """Share of drawings, and of their reconstructions, that the judge reads right in every head at once."""
    pixels = np.stack([drawing.pixels for drawing in drawings])
    truth = {name: torch.tensor([labels(drawing)[name] for drawing in drawings]) for name in CLASSES}
    figures: dict[str, object] = {"tested": len(drawings)}
    for what, pictures in (("drawings", pixels), ("reconstructions", reconstruct(vae, pixels))):
        found = read_all(judge, pictures)
        right = torch.stack([found[name] == truth[name] for name in CLASSES])
        figures[f"reader_all_right_{what}"] = round(right.all(0).float().mean().item(), 4)
        shares = right.float().mean(1).tolist()
        figures[f"reader_by_attribute_{what}"] = {n: round(s, 4) for n, s in zip(CLASSES, shares, strict=True)}
    return figures


def flaws_seen(judge: Judge, drawings: list[Drawing], flaws: list[Flaw]) -> dict[str, object]:
    """Share of flawed drawings that the judge finds not intact, or with more birds or flowers than any caption names.

    Args:
        flaws: the flaw of each drawing.
    """
    found = read_all(judge, np.stack([drawing.pixels for drawing in drawings]))
    too_many = torch.stack([found[name] >= len(VALUES[name]) for name in COUNTED]).any(0)
    seen = ~answers(found, [{}] * len(drawings))["intact"] | too_many
    by_flaw = {
        flaw: round(seen[torch.tensor([one == flaw for one in flaws])].float().mean().item(), 4)
        for flaw in dict.fromkeys(flaws)
    }
    share = round(seen.float().mean().item(), 4)
    return {"flawed_tested": len(drawings), "reader_sees_flawed": share, "reader_sees_by_flaw": by_flaw}

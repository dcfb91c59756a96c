"""Real pictures of the same captions: what the arms are measured against, and the ceiling beside them.

They are the base's own making. Their distances are taken after they went through the VAE, as the arms' pictures do, so
that what the VAE loses is held against nobody; alignment and answer key see them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fewstep.benchmark.plan import Plan
from fewstep.pictures import PictureBatch, as_bytes
from fewstep.solver import OnStep


class RealPictures:
    """`each` real pictures for every prompt, made when the first one is asked for.

    Args:
        plan: whose base makes them.
        each: how many a prompt.
        seed: other seeds give other pictures.
    """

    def __init__(self, plan: Plan, each: int, seed: int) -> None:
        self._plan, self._each, self._seed = plan, each, seed

    @cached_property
    def _pixels(self) -> Tensor:
        """uint8 [P · each, 3, H, W], prompt by prompt."""
        abilities = self._plan.backbone.abilities
        assert abilities is not None
        drawn = abilities.reference_pictures(list(self._plan.prompts), self._each, self._seed)
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()

    def batch(self, ids: Sequence[tuple[int, int]], on_step: OnStep) -> PictureBatch:
        """The pictures of these (prompt number, picture number), with their latents; it takes no time."""
        pixels = self._pixels[[prompt * self._each + picture for prompt, picture in ids]]
        backbone = self._plan.backbone
        latents = backbone.encode((pixels.float() / 127.5 - 1).to(backbone.device)).cpu()
        on_step()
        return PictureBatch(tuple(ids), tuple(self._plan.prompts[prompt] for prompt, _ in ids), latents, pixels, 0.0)


def looks_of(plan: Plan, pixels: Tensor) -> dict[str, Tensor]:
    """What distances are taken between, of pixels uint8 [B, 3, H, W]: "features", "embedding", as far as they exist."""
    found = {}
    if plan.features is not None:
        found["features"] = plan.features(pixels)
    if plan.alignment is not None:
        found["embedding"] = plan.alignment.images(pixels)
    return found


def looks_through_vae(plan: Plan, batch: PictureBatch) -> dict[str, Tensor]:
    """`looks_of` pictures after the VAE."""
    return looks_of(plan, as_bytes(plan.backbone.decode(batch.latents)))

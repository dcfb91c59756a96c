"""The safety checker that comes with Stable Diffusion: which pictures it objects to.

Off in benchmarks, where blackened pictures would corrupt scores; a flag in `generate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.files import at_home

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker


class SafetyChecker:
    """The checker of a base in diffusers' layout (`safety_checker/`, `feature_extractor/`).

    Args:
        base: folder or Hub id.
        revision: branch, tag or commit of a Hub id.
        device: where to run it.
        allow_pickle: also take weights that are not safetensors.

    Raises:
        InputError: the base has none, or it is not at hand.
    """

    def __init__(
        self,
        base: str,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        from transformers import CLIPImageProcessorPil

        place = str(at_home(base)) if at_home(base).is_dir() else base  # a path comes before a Hub id, as for bases
        try:
            self._network = _open(place, revision, allow_pickle)
            self._processor = CLIPImageProcessorPil.from_pretrained(
                place, subfolder="feature_extractor", revision=revision
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"the base {base!r} brings no safety checker, or it is not at hand; allowed are bases with "
                "safety_checker/ and feature_extractor/; leave --safety_checker out, or pass such a --base_model"
            ) from error
        self._network.to(device).eval()
        self._device = torch.device(device)

    @torch.no_grad()
    def objections(self, pixels: Tensor) -> list[bool]:
        """For each of the pictures [B, 3, H, W] uint8, whether the checker objects to it."""
        arrays = list(pixels.permute(0, 2, 3, 1).cpu().numpy())
        inputs = self._processor(images=arrays, input_data_format="channels_last", return_tensors="pt")
        # It blackens what it objects to in place, in the arrays it is given: those are thrown away.
        scratch = [np.zeros((1, 1, 3), dtype=np.float32) for _ in arrays]
        _, found = self._network(images=scratch, clip_input=inputs["pixel_values"].to(self._device))
        return [bool(one) for one in found]


def _open(base: str, revision: str | None, allow_pickle: bool) -> StableDiffusionSafetyChecker:
    """The network, in fp32 as the pictures it is given: from its plain weights, else from those in half precision."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    def read(variant: str | None) -> StableDiffusionSafetyChecker:
        network: StableDiffusionSafetyChecker = StableDiffusionSafetyChecker.from_pretrained(
            base,
            subfolder="safety_checker",
            revision=revision,
            variant=variant,
            dtype=torch.float32,
            use_safetensors=None if allow_pickle else True,
        )
        return network

    try:
        return read(None)
    except OSError:
        return read("fp16")

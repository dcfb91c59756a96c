"""Features of pictures, between which distances are taken: of a network of the base's own, or of DINOv2."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError
from fewstep.metrics.pretrained import as_arrays, load_pretrained


class Features(Protocol):
    """A named feature extractor."""

    @property
    def name(self) -> str: ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] to features [B, D] on the CPU."""
        ...


class OwnFeatures:
    """The network that a base brings along, wherever it runs: pixels [B, 3, H, W] in 0 ... 1 to [B, D]."""

    name = "the base's own features"

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        place = next(self._network.parameters(), pixels).device
        found: Tensor = self._network((pixels.float() / 255).to(place))
        return found.cpu()


class DINOFeatures:
    """A DINO vision transformer by folder or Hub id, such as facebook/dinov2-base: its normed class token.

    Args:
        model: folder or Hub id in transformers' layout.
        device: where to run it; always in fp32.
        allow_pickle: also take weights that are not safetensors.

    Raises:
        ModelNotAtHand: the weights are not at hand.
        CheckpointError: they are incomplete, or another model's.
    """

    def __init__(self, model: str, *, device: torch.device | str = "cpu", allow_pickle: bool = False) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.name = model
        # Pillow's processor also where torchvision is installed: it resizes differently.
        self._network, self._processor = load_pretrained(
            model, AutoModel, AutoImageProcessor, flag="--feature_model", allow_pickle=allow_pickle, backend="pil"
        )
        kind = self._network.config.model_type
        if not kind.startswith("dino"):
            raise CheckpointError(f"{model!r} holds a {kind} model; allowed is a DINOv2; pass another --feature_model")
        self._network.to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] to features [B, D] fp32 on the CPU; resized and cropped as the model's own."""
        inputs = self._processor(images=as_arrays(pixels), input_data_format="channels_last", return_tensors="pt")
        found: Tensor = self._network(pixel_values=inputs["pixel_values"].to(self._device)).pooler_output
        return found.cpu()

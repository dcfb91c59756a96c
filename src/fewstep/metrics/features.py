"""Features of pictures, between which distances are taken: of a network of the base's own, DINOv2 or Inception."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.errors import CheckpointError, first_line
from fewstep.metrics.pretrained import ModelNotAtHand, as_arrays, fingerprint, load_pretrained

INCEPTION = "inception"
"""What `--feature_model` says where Inception's features are wanted, those of the usual FID."""


class Features(Protocol):
    """A named feature extractor."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Of its weights."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] to features [B, D] on the CPU."""
        ...


class OwnFeatures:
    """The network that a base brings along, wherever it runs: pixels [B, 3, H, W] in 0 ... 1 to [B, D]."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.fingerprint = fingerprint(network)
        self.name = f"the base's own features ({self.fingerprint[:8]})"

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
        self.fingerprint = fingerprint(self._network)
        self._network.to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] to features [B, D] fp32 on the CPU; resized and cropped as the model's own."""
        inputs = self._processor(images=as_arrays(pixels), input_data_format="channels_last", return_tensors="pt")
        found: Tensor = self._network(pixel_values=inputs["pixel_values"].to(self._device)).pooler_output
        return found.cpu()


class InceptionNotAtHand(ModelNotAtHand):
    """`InceptionFeatures` without the libraries, the leave or the file that they need."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        CheckpointError.__init__(
            self, f"the features {INCEPTION!r} of --feature_model are not at hand ({reason}); or pass another one"
        )


class InceptionFeatures:
    """The 2048 features of the Inception network that published FIDs are taken over, by torch-fidelity's port.

    torchmetrics resizes to 299 × 299, bilinear with antialiasing: not what every published FID does.

    Args:
        device: where to run it; always in fp32.
        allow_pickle: its weights are a pickled file, fetched once from its authors; only tensors are read from it.

    Raises:
        InceptionNotAtHand: torch-fidelity or its torchvision is not installed, pickled weights are not allowed, or
            they cannot be fetched or read.
    """

    name = "Inception's 2048 features"

    def __init__(self, *, device: torch.device | str = "cpu", allow_pickle: bool = False) -> None:
        try:
            import torch_fidelity  # noqa: F401  # torchmetrics asks only whether it is installed, not whether it works
            from torchmetrics.image.fid import NoTrainInceptionV3
        except (ImportError, RuntimeError) as error:  # of torchvision: built for another torch
            raise InceptionNotAtHand(f"{first_line(error)}; run `pip install 'fewstep[fid]'`") from error
        if not allow_pickle:
            raise InceptionNotAtHand("its weights are a pickled file; add --allow_pickle")
        try:
            with _tensors_alone():
                network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        except Exception as error:  # of the network, of the disk, of the file: there is no common one
            place = os.path.join(torch.hub.get_dir(), "checkpoints")
            raise InceptionNotAtHand(f"its weights cannot be had in {place}: {first_line(error)}") from error
        self.fingerprint = fingerprint(network)
        self._network = network.to(device).requires_grad_(False)
        self._device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, 3, H, W] to features [B, 2048] fp32 on the CPU."""
        found: Tensor = self._network(pixels.to(self._device))
        return found.float().cpu()


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Whatever libraries unpickle inside, torch reads tensors from it and runs nothing."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

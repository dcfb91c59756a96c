"""An adapter on a UNet: LoRA layers W x + (alpha / rank) B A x (Hu et al. 2022, eq. 3), B zero at the start."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, InputError
from ..randomness import generator

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from peft.tuners.lora import LoraLayer

ADAPTER = "student"
"""Name under which the adapter that is trained or sampled with is attached."""

PREFIX = "unet."
"""What the names of a diffusers-layout file start with."""


def attach(
    unet: UNet2DConditionModel, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> list[nn.Parameter]:
    """Attach a new adapter to `unet` and make it the active one; the output stays the base's until it is trained.

    Args:
        rank: of A and B.
        alpha: the update is scaled with alpha / rank.
        targets: ends of module names, such as "to_q" or "to_out.0".
        seed: of A, which is uniform as in torch's and PEFT's linear layers; the same on every device.

    Returns:
        The adapter's parameters, fp32, in the order of `named_parameters`; all else is frozen.

    Raises:
        InputError: a target that the UNet does not have.
        ValueError: an adapter is attached already: a second one in its place would start from nothing, silently.
    """
    if getattr(unet, "peft_config", {}):
        raise ValueError(f"the UNet has an adapter already: {', '.join(unet.peft_config)}; detach it first")
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            known = sorted(
                {name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()} | {"to_out.0"}
            )
            raise InputError(
                f"lora_targets {target!r} names no layer of the UNet; allowed are ends such as {' '.join(known)}"
            )
    _add(unet, rank=rank, alpha=alpha, targets=list(targets), ranks={}, alphas={})
    with torch.no_grad():
        for name, layer in lora_layers(unet):
            down = torch.empty(layer.lora_A[ADAPTER].weight.shape)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator(seed, "lora", name))
            layer.lora_A[ADAPTER].weight.copy_(down)
            layer.lora_B[ADAPTER].weight.zero_()
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def attach_empty(unet: UNet2DConditionModel, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> None:
    """Attach an adapter with its own rank and alpha for each module, named in full, for weights to be put in."""
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    _add(
        unet,
        rank=rank,
        alpha=alpha,
        targets=list(ranks),
        # PEFT reads the keys as regular expressions that have to fit the end of a name.
        ranks={f"^{name}": own for name, own in ranks.items() if own != rank},
        alphas={f"^{name}": own for name, own in alphas.items() if own != alpha},
    )


def _add(
    unet: UNet2DConditionModel,
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    ranks: dict[str, int],
    alphas: dict[str, float],
) -> None:
    from peft import LoraConfig

    from .folding import FoldingLinear

    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
    config._register_custom_module({nn.Linear: FoldingLinear})  # PEFT's own way of bringing in another layer
    unet.add_adapter(config, adapter_name=ADAPTER)
    for _, layer in lora_layers(unet):  # PEFT follows the precision of the base layer; the optimizer needs fp32
        layer.lora_A[ADAPTER].float()
        layer.lora_B[ADAPTER].float()


def set_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """The adapter's strength: its update is scaled with scale · alpha / rank; 1 is as it was trained."""
    for _, layer in lora_layers(unet):
        layer.set_scale(ADAPTER, scale)


def detach(unet: UNet2DConditionModel) -> None:
    """Remove every adapter: the UNet is the base again."""
    if getattr(unet, "peft_config", {}):
        unet.unload_lora()


def lora_layers(unet: UNet2DConditionModel, adapter: str = ADAPTER) -> Iterator[tuple[str, LoraLayer]]:
    """(module name, layer) for every module that carries `adapter`."""
    from peft.tuners.lora import LoraLayer

    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield name, module


def trainable_parameters(unet: UNet2DConditionModel) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)


def digest(unet: UNet2DConditionModel) -> str:
    """SHA-256 of the attached adapter: of each layer's name, scale (that of its alpha included) and weights."""
    found = hashlib.sha256()
    for name, layer in sorted(lora_layers(unet), key=lambda named: named[0]):
        found.update(f"{name} {layer.scaling[ADAPTER]!r}".encode())
    for name, parameter in sorted(AdapterWeights(unet).parameters().items()):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class AdapterWeights:
    """The weights of an attached adapter under their names in a diffusers-layout file, to save and to put back.

    Args:
        unet: the UNet that carries it.
        adapter: its name there.
    """

    def __init__(self, unet: UNet2DConditionModel, adapter: str = ADAPTER) -> None:
        self.unet = unet
        self.adapter = adapter

    def parameters(self) -> dict[str, nn.Parameter]:
        """Name in the file -> the parameter itself."""
        return {
            f"{PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)[self.adapter].weight
            for name, layer in lora_layers(self.unet, self.adapter)
            for matrix in ("lora_A", "lora_B")
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU, fp32."""
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True).contiguous()
            for name, parameter in self.parameters().items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the parameters, which stay the same objects, so that an optimizer keeps hold of them.

        Raises:
            CheckpointError: other names or other shapes.
        """
        own = self.parameters()
        odd = sorted(own.keys() ^ state.keys())
        odd += [name for name in own if name in state and own[name].shape != state[name].shape]
        if odd:
            raise CheckpointError(
                f"these adapter weights do not fit the adapter that is attached, first at {odd[0]}; allowed are "
                "weights of the same base, rank and targets; resume with the settings saved beside the checkpoint"
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])

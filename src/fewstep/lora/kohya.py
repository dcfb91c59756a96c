"""An adapter in kohya's layout, which is what ComfyUI, the web UIs and most other tools read.

Of diffusers' layout these take a part, or nothing, and none of them reads the alpha in its header: they would draw with
the wrong strength. Here every module has its alpha beside its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..files import write_tensors_atomic
from .adapter import ADAPTER, AdapterWeights, lora_layers
from .layouts import KOHYA

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def kohya_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The attached adapter: `lora_unet_MODULE.lora_down.weight`, `.lora_up.weight` and `.alpha` of each module, fp32.

    MODULE is the module's name with underscores for points.
    """
    weights, found = AdapterWeights(unet).state_dict(), dict[str, Tensor]()
    for name, layer in lora_layers(unet):
        down, up = (weights[f"unet.{name}.lora_{matrix}.weight"] for matrix in "AB")
        key = KOHYA + name.replace(".", "_")
        found[f"{key}.lora_down.weight"] = down.detach().cpu().float().contiguous()
        found[f"{key}.lora_up.weight"] = up.detach().cpu().float().contiguous()
        found[f"{key}.alpha"] = torch.tensor(layer.scaling[ADAPTER] * down.shape[0])
    return found


def save_kohya(tensors: Mapping[str, Tensor], file: Path, more: Mapping[str, str]) -> None:
    """Write `kohya_tensors` to `file`, whole or not at all, with `more` in its header."""
    ranks = Counter(value.shape[0] for name, value in tensors.items() if name.endswith(".lora_down.weight"))
    alphas = Counter(value.item() for name, value in tensors.items() if name.endswith(".alpha"))
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": f"{alphas.most_common(1)[0][0]:g}",
        **more,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors_atomic(file, tensors, header)

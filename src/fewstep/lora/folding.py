"""A linear layer with an adapter, learnt by one multiplication instead of three where that is less arithmetic.

    y = W x + s B (A x)        as PEFT has it: the layer, down to the rank, up again
    y = (W + s B A) x          the same numbers up to rounding

To learn A and B from N inputs, a layer of i × o numbers takes N (2 i o + 3 r (i + o)) multiplications the first way,
there and back. The second takes 3 (N + r) i o: its gradients come by way of that of W + s B A. That is less where a
layer is narrow beside the rank: nearly everywhere in a small base, at Stable Diffusion's size from rank 50 on.

In fp32 alone: rounded to half precision, W + s B A would lose most of what an adapter adds. And for learning alone:
what is drawn stays, bit for bit, what stock pipelines draw.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn


def folding_pays(count: int, inputs: int, outputs: int, rank: int) -> bool:
    """Whether A and B are learnt with fewer multiplications from (W + s B A) x than from W x + s B (A x).

    Args:
        count: N, how many vectors are multiplied.
        inputs, outputs: of the layer.
        rank: of the adapter.
    """
    layer, around = inputs * outputs, rank * (inputs + outputs)
    return 3 * (count + rank) * layer < count * (2 * layer + 3 * around)


class FoldingLinear(Linear):  # type: ignore[misc]  # PEFT has no types
    """PEFT's linear layer under LoRA. It folds where `folding_pays` and a plain adapter, the only one active, is learnt
    in fp32 by a network that is not compiled: a compiler has ways of its own.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[..., inputs] to [..., outputs]."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or args or kwargs:
            return super().forward(x, *args, **kwargs)
        name = self._learnt(x)
        if name is None or not folding_pays(x.shape[:-1].numel(), *self._sizes(name)):
            return super().forward(x)
        layer, down, up = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        return F.linear(x, torch.addmm(layer.weight, up, down, alpha=self.scaling[name]), layer.bias)

    def _sizes(self, name: str) -> tuple[int, int, int]:
        rank, inputs = self.lora_A[name].weight.shape
        return inputs, self.out_features, rank

    def _learnt(self, x: Tensor) -> str | None:
        """The active adapter, where it is the only one, a plain one, learnt, and everything is fp32."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        (name,) = active
        down, up = self.lora_A[name].weight, self.lora_B[name]
        plain = isinstance(self.lora_dropout[name], nn.Identity) and up.bias is None
        exact = all(one.dtype == torch.float32 for one in (x, self.get_base_layer().weight, down, up.weight))
        alone = plain and exact and down.requires_grad and not torch.is_autocast_enabled(x.device.type)
        return name if alone else None

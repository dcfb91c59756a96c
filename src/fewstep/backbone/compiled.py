"""torch.compile of a UNet for a training's batches: a few graphs of fixed shapes, whatever sizes come.

What is compiled is a function around the network: its weights, their names and its own forward stay as they are, so
that nothing that saves, compares or draws with it needs to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

BACKEND = "inductor"
"""Of torch.compile."""

UNetCall = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x_t [B, C, H, W], t int64 [B], cond [B, L, D] to the raw output [B, C, H, W]."""


def eager(unet: UNet2DConditionModel) -> UNetCall:
    """The network as it is."""

    def call(x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        output: Tensor = unet(x_t, t, encoder_hidden_states=cond, return_dict=False)[0]
        return output

    return call


class Compiled:
    """The network compiled for `rows` and for 2 · `rows` samples, and for nothing else.

    Other numbers of samples are cut into such parts and the last one is filled up with copies, for samples do not need
    each other: a guided batch is one part, and what varies from update to update compiles nothing anew. There is a
    graph a size, with adapters on and off, with gradients and without, each made when it is first needed.
    """

    def __init__(self, unet: UNet2DConditionModel, rows: int) -> None:
        self._rows = rows
        # Whole and for each shape anew: where that is not to be had, an error instead of slow code.
        self._call = torch.compile(eager(unet), fullgraph=True, dynamic=False, backend=BACKEND)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        parts = [self._filled(x_t[at : at + size], t[at : at + size], cond[at : at + size], size)
                 for at, size in self._cut(len(x_t))]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _cut(self, count: int) -> list[tuple[int, int]]:
        """(first sample, size) of each part of a batch."""
        double = 2 * self._rows
        cuts = [(at, double) for at in range(0, count - double + 1, double)]
        rest = count % double
        return [*cuts, (count - rest, self._rows if rest <= self._rows else double)] if rest else cuts

    def _filled(self, x_t: Tensor, t: Tensor, cond: Tensor, size: int) -> Tensor:
        count = len(x_t)
        if count == size:
            return self._call(x_t, t, cond)
        inputs = (torch.cat([one, one[-1:].expand(size - count, *one.shape[1:])]) for one in (x_t, t, cond))
        return self._call(*inputs)[:count]


def check_compiler(device: torch.device, setting: str) -> None:
    """Compile one operation: what does not work for one does not work for a network.

    Args:
        setting: what asked for it, as it is typed.

    Raises:
        InputError: it does not work on this machine.
    """
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # of dynamo, of inductor, of Triton, of the compiler: there is no common one
        needed = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        raise InputError(
            f"{setting} came, but torch.compile does not work here ({first_line(error)}); allowed is a "
            f"machine with {needed}; install it, or leave compile out"
        ) from error

"""A small network on several cores: the batch cut into one part a thread, instead of all threads in every operation.

Operations of a network of a few million parameters are too short to be shared out: two threads make them hardly faster
than one. Its pictures do not need each other, so each thread takes some of them through the whole network.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor, nn

SMALL = 50_000_000
"""Parameters below which a network counts as small; at Stable Diffusion's 860 million one operation is work enough."""

PER_THREAD = 4
"""Samples a thread below which its part is too little: one thread a part is then slower than all in every operation."""


def is_small(network: nn.Module) -> bool:
    """Whether the network is better run picture by picture than operation by operation."""
    return sum(parameter.numel() for parameter in network.parameters()) < SMALL


def whole(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """`forward(*inputs)`."""
    return forward(*inputs)


def in_parts(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    """`forward(*inputs)` of inputs [B, ...], computed as one part a thread where that is possible.

    That is on the CPU, without gradients, and with enough samples for every thread; else `forward` runs as it is.

    Args:
        forward: of one sample independently of the others; under autocast only if it enters that itself, for it does
            not pass from thread to thread.
    """
    threads = torch.get_num_threads()
    if inputs[0].device.type != "cpu" or torch.is_grad_enabled() or not 1 < threads <= len(inputs[0]) // PER_THREAD:
        return forward(*inputs)

    def one(part: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad():  # nor does this
            return forward(*part)

    parts = zip(*(tensor.tensor_split(threads) for tensor in inputs), strict=True)
    return torch.cat(list(_pool(threads).map(one, parts)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # The number set here is each thread's own: the caller's operations go on with all of them.
    return ThreadPoolExecutor(threads, "fewstep", initializer=torch.set_num_threads, initargs=(1,))

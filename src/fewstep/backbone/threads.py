"""A small network on several cores: the batch cut into one part a thread, instead of all threads in every operation.

Operations of a network of a few million parameters are too short to be shared out: two threads make them hardly faster
than one. Its pictures do not need each other, so each thread takes some of them through the whole network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, reduce
from itertools import accumulate
from threading import Barrier
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

SMALL = 50_000_000
"""Parameters below which a network counts as small; at Stable Diffusion's 860 million one operation is work enough."""

PER_THREAD = 4
"""Samples a thread below which its part is too little: one thread a part is then slower than all in every operation."""


_splits = ContextVar("splits", default=True)


def is_small(network: nn.Module) -> bool:
    """Whether the network is better run picture by picture than operation by operation."""
    counted = accumulate(parameter.numel() for parameter in network.parameters())
    return all(count < SMALL for count in counted)  # of a large one only the first few are asked


def whole(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], learnt: Iterable[nn.Parameter] = ()) -> Tensor:
    """`forward(*inputs)`."""
    return forward(*inputs)


def in_parts(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], learnt: Iterable[nn.Parameter] = ()) -> Tensor:
    """`forward(*inputs)` of inputs [B, ...], computed as one part a thread where that is possible.

    That is on the CPU and with enough samples for every thread; else `forward` runs as it is.

    Args:
        forward: of one sample independently of the others; under autocast only if it enters that itself, for it does
            not pass from thread to thread.
        learnt: the parameters that gradients are asked of; where gradients are on and there are none of these, or an
            input wants one too, the batch stays whole.
    """
    threads = torch.get_num_threads()
    if inputs[0].device.type != "cpu" or not 1 < threads <= len(inputs[0]) // PER_THREAD or not _splits.get():
        return forward(*inputs)
    if not torch.is_grad_enabled():
        return torch.cat(_each(forward, _split(inputs, threads)))
    parameters = [parameter for parameter in learnt if parameter.requires_grad]
    if not parameters or any(tensor.requires_grad for tensor in inputs):
        return forward(*inputs)
    output: Tensor = _InParts.apply(forward, inputs, threads, *parameters)
    return output


@contextmanager
def whole_batches() -> Iterator[None]:
    """Inside, nothing is computed in parts: for what watches autograd can do so in one thread alone."""
    before = _splits.set(False)
    try:
        yield
    finally:
        _splits.reset(before)


class _InParts(torch.autograd.Function):
    """The batch in parts on the way back, too: each thread's gradients of the parameters, added up in order."""

    @staticmethod
    def forward(
        ctx: Any, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...], threads: int, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.parameters = parameters
        ctx.outputs = _each(forward, _split(inputs, threads), gradients=True)
        return torch.cat([output.detach() for output in ctx.outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        def back(output: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(output, ctx.parameters, gradient, allow_unused=True)

        sizes = [len(output) for output in ctx.outputs]
        found = _each(back, list(zip(ctx.outputs, gradients[0].split(sizes), strict=True)))
        del ctx.outputs
        return (None, None, None, *(_sum(parts) for parts in zip(*found, strict=True)))


def _sum(parts: Iterable[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return reduce(torch.add, given) if given else None


def _split(inputs: tuple[Tensor, ...], threads: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.tensor_split(threads) for tensor in inputs), strict=True))


def _each(work: Callable[..., T], parts: list[tuple[Tensor, ...]], gradients: bool = False) -> list[T]:
    """`work` of every part, each in a thread of its own."""

    def one(part: tuple[Tensor, ...]) -> T:
        with torch.set_grad_enabled(gradients):  # this does not pass from thread to thread either
            return work(*part)

    return list(_pool(len(parts)).map(one, parts))


def lone_threads(count: int) -> ThreadPoolExecutor:
    """`count` threads, each of which computes alone; everyone else's operations go on with all of them."""

    def alone() -> None:
        torch.get_num_threads()  # a thread's first operation takes the common number: let this be the first
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "fewstep", initializer=alone)
    # What a thread sets is its own and that of every thread started later: all of these are started now, and then the
    # caller's number is set again for the others.
    before, started = torch.get_num_threads(), Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(before)
    return pool


_pool = cache(lone_threads)

"""From main memory to the device, without waiting for what the device has still to do."""

from __future__ import annotations

import torch
from torch import Tensor

QUEUED = {"cuda", "meta"}
"""Devices that a copy is queued for: CUDA, for which torch keeps a pinned source until the copy is made, and the one
that copies nothing. Elsewhere nobody promises that a source which is let go meanwhile is still read whole."""


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, queued where that is safe.

    A copy from pageable memory makes the host wait until a GPU has come to it, behind all the work that was queued
    before. From pinned memory it is queued itself.
    """
    here = tensor.device.type == "cpu"
    if here and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=here and device.type in QUEUED)


WITHOUT_FP64 = {"mps"}
"""Devices that cannot compute in fp64: Apple's."""


def precise(tensor: Tensor) -> Tensor:
    """`tensor` in fp64, on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type in WITHOUT_FP64 else tensor).double()

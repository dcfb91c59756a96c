"""From main memory to the device, without waiting for what the device has still to do."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor.to(device)`, queued.

    A copy from pageable memory makes the host wait until a GPU has come to it, behind all the work that was queued
    before. From pinned memory it is queued itself; torch keeps that memory until it is made.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")

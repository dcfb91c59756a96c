"""What a piece of work asks of the machine: operations counted, and memory at its peak."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fewstep.allocator import give_back_freed_memory


def _cpu_attention(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
"""Attention on the CPU, which torch's own counter leaves out (2.13)."""


def flops(work: Callable[[], object]) -> int:
    """Floating point operations of `work`'s matrix products, convolutions and attention: 2 a multiply-add.

    Counts what this thread does; elementwise work is not counted. What is compiled is counted as it was written.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with torch.compiler.set_stance("force_eager"), counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Do `work`; bytes at its peak: allocated on a GPU, resident on a CPU under Linux; None where nobody tells."""
    known = _start_anew(device)
    work()
    return peak_so_far(device) if known else None


def allocated(device: torch.device) -> int | None:
    """Bytes in use on a GPU by now; None where nobody tells."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def _start_anew(device: torch.device) -> bool:
    """Have the device's peak begin from here; whether it can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        give_back_freed_memory()  # of whatever ran before
        try:
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
        except OSError:  # not there, or not ours to reset, as in some containers
            return False
    return device.type in {"cuda", "cpu"}


def peak_so_far(device: torch.device) -> int | None:
    """The same since the process began, or since `peak_memory` was last called."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _kilobytes("/proc/self/status", "VmHWM") if device.type == "cpu" else None


def _kilobytes(file: str, name: str) -> int | None:
    """Bytes of an entry of one of Linux's files about memory; None where there is no such file."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path(file).read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def kept_for_backward(work: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of `work`, each piece of memory once.

    Args:
        work: a forward pass with gradient.
        known: tensors that are there anyway and do not count, such as the weights.
    """
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        work()
    return sum(kept.values())


def room(device: torch.device) -> int | None:
    """Bytes that could still be taken: of a GPU's memory, with what torch holds in reserve; of a CPU's under Linux."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _kilobytes("/proc/meminfo", "MemAvailable") if device.type == "cpu" else None

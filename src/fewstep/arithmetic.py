"""What a piece of work asks of the machine: operations counted, and memory at its peak."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _cpu_attention(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
"""Attention on the CPU, which torch's own counter leaves out (2.13)."""


def flops(work: Callable[[], object]) -> int:
    """Floating point operations of `work`'s matrix products, convolutions and attention: 2 a multiply-add.

    Counts what this thread does; elementwise work is not counted.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of `work`: allocated on a GPU, resident on a CPU under Linux; None where nobody tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return int(torch.cuda.max_memory_allocated(device))
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type != "cpu" or not status.exists():
        return None
    try:
        refs.write_text("5")  # the peak starts again from here (proc(5))
        work()
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    except OSError:  # not ours to reset, in some containers
        return None
    return 1024 * int(found[1]) if found else None

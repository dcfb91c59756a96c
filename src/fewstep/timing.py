"""Timing that can be trusted: warmed up at the timed shape, the device synchronised, repeated, median and spread."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one thing, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def iqr(self) -> float:
        """Interquartile range: the spread of the middle half."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low)


def synchronise(device: torch.device | str) -> None:
    """Wait until ``device`` has done all it was given; a CPU has nothing to wait for."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
    elif kind == "xpu":
        torch.xpu.synchronize(device)


WARMUP = 1
"""Runs that are not timed, before those that are."""


def measure(
    work: Callable[[], object],
    *,
    repeats: int = 5,
    warmup: int = WARMUP,
    device: torch.device | str = "cpu",
    on_run: Callable[[], object] = lambda: None,
) -> Timing:
    """Run ``work`` ``warmup`` times unmeasured, then ``repeats`` times by the wall clock.

    ``on_run`` is called after each of them, outside what is timed.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"{repeats} repeats and {warmup} warm-ups; allowed are at least 1 and 0")
    for _ in range(warmup):
        work()
        on_run()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
        on_run()
    return Timing(tuple(seconds))


_PROBE = 384
"""Side of a product that takes no time at all, or a little where the precision is slow."""

BEST_OF, LONGEST = 10, 4.0
"""Products that are timed for a matrix rate, and how many seconds they may take on a CPU."""


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype, side_on_cpu: int = 1536) -> float:
    """Operations a second of one large square matrix product, the best of ten: what the machine can do at all.

    On a CPU that has no units for a precision the large product would take minutes: it is a smaller one there.
    """
    side = 8192
    if device.type == "cpu":
        seconds = min(_products(_PROBE, device, dtype, repeats=2))
        side = affordable_side(side_on_cpu, seconds)
    return 2 * side**3 / min(_products(side, device, dtype, repeats=BEST_OF))


def affordable_side(wanted: int, seconds: float) -> int:
    """`wanted`, halved until its products can be afforded; `seconds` is what one of side 384 took."""
    side = wanted
    while side > _PROBE and (BEST_OF + WARMUP) * seconds * (side / _PROBE) ** 3 > LONGEST:
        side //= 2
    return side


def _products(side: int, device: torch.device, dtype: torch.dtype, repeats: int) -> tuple[float, ...]:
    """Seconds of each product."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return measure(lambda: torch.mm(a, b, out=out), repeats=repeats, warmup=WARMUP, device=device).seconds


@cache
def quick_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """`matrix_rate` from a product an eighth as large on a CPU, measured once a process."""
    return matrix_rate(device, dtype, side_on_cpu=768)


def machine(device: torch.device | str, precision: str) -> dict[str, str]:
    """What was timed on, in words: device, its precision, threads, operating system."""
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else _processor()
    return {
        "device": name if place.type in {"cuda", "cpu"} else f"{place.type} on {name}",
        "precision": precision,
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
    }


def _processor() -> str:
    """The CPU's name; `platform.processor` leaves it empty on Linux."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()

"""The C library's memory: kept for the next forward instead of given back to the system after each.

Measured, it is given back first: the peak of what is timed is not to be that of what came before.

A forward on a CPU asks for the same tensors of some megabytes again and again. glibc maps each of them anew, and every
page of it is a fault into the system: about a tenth of the time that a small network draws in.
"""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Parameters of mallopt(3)."""

NEVER = 2**31 - 1
LARGEST = 32 * 2**20
"""Bytes above which a tensor is mapped all the same: the most that mallopt(3) allows."""
AHEAD = 256 * 2**20
"""Bytes asked of the system at once."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, in this process; for programs of our own, not for a library's caller.

    Returns:
        Whether it does: not with another C library, and not where the environment says how memory is to be had.
    """
    asked = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if asked or platform.libc_ver()[0] != "glibc":
        return False
    settings = {MMAP_THRESHOLD: LARGEST, TRIM_THRESHOLD: NEVER, TOP_PAD: AHEAD}
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())


def give_back_freed_memory() -> None:
    """Give what is freed, and was kept, back to the system, so that what is resident from here on is in use."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

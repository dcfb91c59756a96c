"""What the processes that work for a main one do about signals. Layer 0: no torch."""

from __future__ import annotations

import ctypes
import signal
import sys

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What asks a command to stop: Control-C, a scheduler, a terminal that is closed."""

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def leave_to_the_main_process(_worker: int = 0) -> None:
    """Be deaf to `STOPPING`, and end with the main process: a `worker_init_fn` of loaders.

    Control-C goes to every process of the terminal, and a scheduler's SIGTERM to every one of the job. The main one
    decides what becomes of them. Where it is killed it cannot: Linux then ends them, which else would wait for ever to
    hand over what nobody reads, with their hands on the GPU.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

"""What the processes that work for a main one do about signals. Layer 0: no torch."""

from __future__ import annotations

import signal


def leave_to_the_main_process(_worker: int) -> None:
    """Be deaf to SIGINT and SIGTERM: a `worker_init_fn` of loaders.

    Control-C goes to every process of the terminal, and a scheduler's SIGTERM to every one of the job. The main one
    decides what becomes of them, and its workers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

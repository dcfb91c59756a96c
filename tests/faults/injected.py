"""The real command with one thing changed in it: `python injected.py FAULT train --max_steps …`."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

from fewstep.cli import main

DAY = 86_400.0


def jumping_clock() -> None:
    """The wall clock is a day ahead, right, a day or a month behind, each time that it is looked at."""
    honest, jumps = time.time, itertools.cycle([DAY, 0.0, -DAY, -30 * DAY])
    time.time = lambda: honest() + next(jumps)
    time.time_ns = lambda: int(time.time() * 1e9)


def nan_once() -> None:
    """The loss of the second micro-batch of the third update is not a number."""
    _break_losses(lambda call: call == 5)


def nan_for_good() -> None:
    """From the second micro-batch of the third update on, no loss is a number."""
    _break_losses(lambda call: call >= 5)


def loading_worker() -> None:
    """Data is loaded by another process, as it is where a GPU does the training."""
    from fewstep.train import start

    start.loading_workers = lambda *_: 1  # type: ignore[assignment]


def _break_losses(broken: Callable[[int], bool]) -> None:
    from fewstep.methods.kstep import KStep

    honest, calls = KStep.loss, itertools.count()

    def loss(self: KStep, *inputs: Any) -> Any:
        return honest(self, *inputs) * (float("nan") if broken(next(calls)) else 1.0)

    KStep.loss = loss  # type: ignore[method-assign]


FAULTS = {fault.__name__: fault for fault in (jumping_clock, nan_once, nan_for_good, loading_worker)}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))

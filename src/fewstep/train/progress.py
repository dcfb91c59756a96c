"""What a run counts between two lines of its history: part of a checkpoint, so that the lines after it are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from fewstep.telemetry import LossByTimestep


class Progress:
    """The losses of every process and the updates skipped, since the last line.

    Attributes:
        skipped_in_a_row: updates.
        skipped_since_logged: updates.
    """

    def __init__(self, losses: LossByTimestep, accelerator: Accelerator) -> None:
        self._losses, self._accelerator = losses, accelerator
        self._everybodys = losses.sums()[None]
        self.skipped_in_a_row = self.skipped_since_logged = 0

    def count(self, *, moved: bool) -> None:
        """An update is done, whose gradient was finite and `moved` the weights, or was not."""
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        self.skipped_since_logged += not moved

    def gather(self) -> None:
        """Ask every process for its losses, for `state_dict`; to be called by all of them."""
        self._everybodys = self._accelerator.gather(self._losses.sums()[None])

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": self._everybodys,  # [processes, points, 2]
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_since_logged": self.skipped_since_logged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each process takes up its own losses; where their number is another one now, the first one takes all."""
        losses, first = state["losses"], self._accelerator.is_main_process
        if len(losses) == self._accelerator.num_processes:
            self._losses.take_up(losses[self._accelerator.process_index])
        else:
            self._losses.take_up(losses.sum(0) if first else torch.zeros_like(losses[0]))
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.skipped_since_logged = state["skipped_since_logged"]

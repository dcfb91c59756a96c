"""What the host wants to know of its device, or of other processes, without holding either up."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class Answer:
    """A yes or no that a device works out, on its way to the host from the moment that it was asked for.

    Args:
        question: bool scalar on the device.
    """

    def __init__(self, question: Tensor) -> None:
        self._value = question.detach().to("cpu", non_blocking=question.is_cuda)  # into pinned memory then
        self._arrived = torch.cuda.current_stream(question.device).record_event() if question.is_cuda else None

    def __bool__(self) -> bool:
        """Waits for the device, but not for what it was given to do since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._value)


class AnyProcess:
    """Whether something is so in any of several processes; they all hear the same, one call late."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._asked = Answer(torch.tensor(False))

    def __call__(self, here: bool) -> bool:
        """Pass on what is so `here`. A process alone is answered at once, one of many what was so a call ago."""
        if self._accelerator.num_processes == 1:
            return here
        count = torch.full((), float(here), device=self._accelerator.device)
        before, self._asked = self._asked, Answer(self._accelerator.reduce(count) > 0)
        return bool(before)

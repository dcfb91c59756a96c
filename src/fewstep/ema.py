"""Running average of the weights that are trained: what is saved to sample with, where it is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of some parameters, theta' <- d theta' + (1 - d) theta after each update.

    The decay grows with the updates, d_n = min(decay, (1 + n) / (10 + n)): the first weights are soon forgotten.

    Args:
        parameters: those to follow; they are averaged in their own dtype and on their own device.
        decay: the limit that the decay grows to, in [0, 1); 0 is off: the average is the weights themselves.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.averages: list[Tensor] = [p.detach().clone() for p in self.parameters] if decay > 0 else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after update number `step`, counted from 1."""
        if self.averages:
            decay = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The averages, in the order of the parameters."""
        return {"averages": list(self.averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Take up what `state_dict` gave."""
        for average, value in zip(self.averages, state["averages"], strict=True):
            average.copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages in the place of the parameters, and the parameters back, bit for bit, at the end."""
        trained = [p.detach().clone() for p in self.parameters] if self.averages else []
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=bool(values)):
            parameter.copy_(value)

"""What looks wrong in a training that goes on: said once, and left to the user."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import Tensor, nn

from fewstep.backbone import Backbone

UPDATES_TO_LOOK_AT = 20
"""After how many updates a gradient that was zero in all of them is dead; in the first one, A's is zero as B is."""

READINGS, FEWEST_READINGS = 20, 10
"""How many losses of a timestep are remembered, and how many it takes to know what is usual."""

LEAP = 10.0
"""Times the usual loss that is a leap: readings of few pictures scatter by a factor of three."""

RISE = 3.0
"""Times the lowest median of so many losses that is no scatter any more: what was learnt is being lost."""


class Watch:
    """Warns, once each, of adapter tensors that no gradient reaches, a loss that leaps or climbs, cut captions.

    Args:
        parameters: name to parameter.
        warn: told, in one line.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], warn: Callable[[str], None]) -> None:
        self._parameters, self._warn = dict(parameters), warn
        self._updates = 0
        self._reached: dict[str, Tensor] = {}
        self._readings: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=READINGS))
        self._lowest: dict[str, float] = {}
        self._leapt = self._climbed = self._cut = False

    @torch.no_grad()
    def gradients(self) -> None:
        """Look at the gradients of an update; nothing waits for the device before the last look."""
        if self._updates == UPDATES_TO_LOOK_AT:
            return
        self._updates += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:  # any, not a norm: squares of small gradients are 0
                alive = parameter.grad.any()
                self._reached[name] = self._reached[name] | alive if name in self._reached else alive
        if self._updates == UPDATES_TO_LOOK_AT:
            dead = [name for name in self._parameters if name not in self._reached or not self._reached[name]]
            if dead:
                self._warn(
                    f"{len(dead)} of {len(self._parameters)} adapter tensors had a gradient of exactly 0 in "
                    f"{UPDATES_TO_LOOK_AT} updates, first {dead[0]}: nothing trains them; look at --lora_targets, or "
                    "use --mixed_precision bf16 or no"
                )

    def captions(self, step: int, captions: Sequence[str], backbone: Backbone) -> None:
        """Look whether captions of update `step` are longer than the base reads."""
        if not self._cut and any(backbone.token_overflow(captions)):
            self._cut = True
            self._warn(f"captions of more than {backbone.max_tokens} tokens are cut, first at step {step}")

    def remember(self, history: Sequence[Mapping[str, float]]) -> None:
        """Take up what a run had seen before it was resumed, and said then."""
        warn, self._warn = self._warn, lambda _: None
        for row in history:
            self.losses(int(row["step"]), row)
        self._warn = warn

    def losses(self, step: int, means: Mapping[str, float]) -> None:
        """Look at mean losses, "loss/t999" and so on; each timestep is compared with itself."""
        for name, value in means.items():
            if not name.startswith("loss/"):
                continue
            readings = self._readings[name]
            usual = median(readings) if len(readings) >= FEWEST_READINGS else value
            if value > LEAP * usual and not self._leapt:
                self._leapt = True
                self._warn(
                    f"{name} leapt to {value:.4g} by step {step}, its median was {usual:.4g}; where it does not come "
                    "back, lower --learning_rate"
                )
            readings.append(value)
            if len(readings) >= FEWEST_READINGS:
                self._median_of(name, step, median(list(readings)[-FEWEST_READINGS:]))

    def _median_of(self, name: str, step: int, now: float) -> None:
        lowest = self._lowest[name] = min(now, self._lowest.get(name, now))
        if now > RISE * lowest and not self._climbed:
            self._climbed = True
            self._warn(
                f"{name} has climbed to {now:.4g} by step {step}, it had been down to {lowest:.4g}: what was learnt is "
                "being lost; stop, and start again with a lower --learning_rate"
            )

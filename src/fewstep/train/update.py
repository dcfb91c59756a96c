"""One optimizer update: from lessons to new weights, or to none where the gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from fewstep.config import TrainSettings
from fewstep.methods.kstep import KStep
from fewstep.solver import Denoiser
from fewstep.train.answers import Answer
from fewstep.train.engine import AdamW
from fewstep.train.rollouts import Lesson
from fewstep.train.watch import Watch

MOST_OVERFLOWS = 24
"""Overflows of fp16 in a row, each of which halves the loss scale, after which the loss itself must be infinite."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """An update that is done, or will be when the device gets there.

    Attributes:
        moved: whether it changed the weights, or its gradient was not finite.
        norm: the gradient's, before it was clipped: a scalar on the device.
        losses: of each micro-batch, the timesteps int64 [P] and the loss of each of its pairs [P], without gradient.
    """

    moved: Answer
    norm: Tensor
    losses: Sequence[tuple[Tensor, Tensor]]


class Updater:
    """Makes updates of the student's parameters, the same ones in every process.

    Args:
        optimizer: an `AdamW` over `parameters`, prepared by the accelerator: it unscales and skips under fp16.
        method: has the loss.
        student: the adapted network.
        watch: is shown the gradients.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: AcceleratedOptimizer,
        parameters: Sequence[nn.Parameter],
        settings: TrainSettings,
        *,
        method: KStep,
        student: Denoiser,
        watch: Watch,
    ) -> None:
        self._accelerator, self._optimizer, self._parameters = accelerator, optimizer, parameters
        self._settings = settings
        self._method, self._student, self._watch = method, student, watch

    def __call__(self, number: int, lessons: Sequence[Lesson]) -> Made:
        """Make update `number`, counted from 0, from a micro-batch a lesson.

        One that overflowed under fp16 is made again from the same lessons, at half the loss scale.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, number)
        scaler, adamw = self._accelerator.scaler, self._optimizer.optimizer
        assert isinstance(adamw, AdamW)
        for _ in range(MOST_OVERFLOWS + 1):
            losses = [self._backward(lesson) for lesson in lessons]
            _average_gradients(self._accelerator, self._parameters)
            norm = self._accelerator.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)  # unscales first
            self._watch.gradients()
            finite = torch.isfinite(norm)
            if adamw.fused:
                adamw.skip_where(~finite)  # a kernel looks for itself, and nothing waits for the device
            if adamw.fused or scaler is not None or finite:  # a scaler looks for itself, too
                self._optimizer.step()
            self._optimizer.zero_grad()
            if not self._optimizer.step_was_skipped:
                moved = finite if scaler is None else torch.tensor(True)
                return Made(moved=Answer(moved), norm=norm, losses=losses)
        take_back_overflows(scaler, MOST_OVERFLOWS + 1)  # so many in a row: it is not the scale
        return Made(moved=Answer(torch.tensor(False)), norm=norm, losses=losses)

    def _backward(self, lesson: Lesson) -> tuple[Tensor, Tensor]:
        with self._accelerator.accumulate():
            mean, each = lesson.loss(self._method, self._student)
            self._accelerator.backward(mean)  # divided by the number of micro-batches, scaled under fp16
        return lesson.pairs.t, each.detach()


def learning_rate(settings: TrainSettings, update: int) -> float:
    """Of update number `update`, from 0: a linear rise over the warm-up, then constant or half a cosine down to 0."""
    warmup = settings.lr_warmup_steps
    if update < warmup:
        return settings.learning_rate * (update + 1) / (warmup + 1)
    if settings.lr_schedule == "constant":
        return settings.learning_rate
    done = (update - warmup) / (settings.max_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """The mean gradient over all processes, once an update.

    In one exchange of the adapter's few numbers: wrapping the UNet would also wrap the teacher's forwards, and would
    exchange after every micro-batch or need to be told not to.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def take_back_overflows(scaler: torch.amp.GradScaler | None, count: int) -> None:
    """Give a loss scale back what `count` overflows took from it: they were not its fault."""
    if scaler is not None:
        scaler.update(scaler.get_scale() / scaler.get_backoff_factor() ** count)

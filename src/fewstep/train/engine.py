"""What makes an update faster and changes no number that matters: a compiled UNet, and AdamW in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.backbone import Backbone, adapters_off
from fewstep.backbone.compiled import Compiled, check_compiler
from fewstep.config import TrainSettings
from fewstep.errors import InputError, first_line, is_out_of_memory
from fewstep.randomness import generator
from fewstep.transfer import precise

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Norm of the difference between what is compiled and what is not, over the norm of the latter. Half precision differs
by that much from itself where sums are taken in another order; a miscompiled gradient is off by all of its size."""

NUDGE = 0.02
"""Spread of what is added to the adapter while gradients are compared: at the start of a run half of them are 0."""


class AdamW(torch.optim.AdamW):
    """torch's AdamW; a state is taken up whether a fused one saved it or a plain one, and changes nothing of that."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {"fused": self.defaults["fused"], "foreach": self.defaults["foreach"]}
        groups = [{**group, **own} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})

    @property
    def fused(self) -> bool:
        """Whether a step is one kernel, which may leave itself out."""
        return bool(self.defaults["fused"])

    def skip_where(self, broken: Tensor) -> None:
        """Let the next step, a fused one, change nothing where `broken`, a bool scalar on the device, is true."""
        self.found_inf = broken.float()  # how torch's own gradient scaler tells it


def fuses(settings: TrainSettings, device: torch.device) -> bool:
    """Whether the optimizer's update is one kernel: on CUDA, where each of the plain one's has to be launched.

    Not under a gradient scaler: a fused step is always called and skips inside, and nobody learns that it did.
    """
    return device.type == "cuda" and settings.mixed_precision != "fp16"


def adamw_of(parameters: Sequence[nn.Parameter], settings: TrainSettings, device: torch.device) -> AdamW:
    """The optimizer of the adapter."""
    return AdamW(parameters, lr=settings.learning_rate, fused=fuses(settings, device))


def quickened(backbone: Backbone, settings: TrainSettings, rows: int) -> Backbone:
    """The same modules as lessons are to be made with; to be called before an adapter is attached.

    With `compile` its denoisers call a compiled form of the UNet; previews, checks and counting go on with the first.

    Args:
        rows: samples of a micro-batch.

    Raises:
        InputError: nothing can be compiled on this machine.
    """
    if not settings.compile:
        return backbone
    check_compiler(backbone.device, "compile")
    return replace(backbone, compiled=Compiled(backbone.unet, rows))


@contextmanager
def compiling(settings: TrainSettings) -> Iterator[None]:
    """Around a training: what was compiled for it would count against the next one's limit."""
    try:
        yield
    finally:
        if settings.compile:
            torch.compiler.reset()


def prove(
    quick: Backbone, plain: Backbone, parameters: Sequence[nn.Parameter], settings: TrainSettings, rows: int
) -> float:
    """Compare the compiled UNet with the UNet itself, on one batch: the teacher's output, the student's, its gradients.

    A compiler may get a network wrong, and a wrong gradient trains without an error. The adapter is nudged meanwhile
    and afterwards is as it was, bit for bit; gradients are left empty.

    Returns:
        The largest of the relative differences.

    Raises:
        InputError: they differ by more than rounding, or the compiler fails.
    """
    shape, device = plain.latent_shape(settings.resolution), plain.device
    rng = generator(settings.seed, "compiled")
    x_t = torch.randn(2 * rows, *shape, generator=rng).to(device)
    t = torch.randint(1000, (2 * rows,), generator=rng).to(device)
    cond = torch.randn(2 * rows, plain.max_tokens, plain.unet.config.cross_attention_dim, generator=rng).to(device)
    before = [parameter.detach().clone() for parameter in parameters]

    def taught(base: Backbone) -> Tensor:
        with torch.no_grad(), adapters_off(base.unet):
            return base.denoiser(adapter=False)(x_t, t, cond)

    def learnt(base: Backbone) -> tuple[Tensor, Tensor]:
        output = base.denoiser()(x_t[:rows], t[:rows], cond[:rows])
        gradients = torch.autograd.grad(output.square().mean(), list(parameters), allow_unused=True)
        found = [gradient.flatten() for gradient in gradients if gradient is not None]
        return output.detach(), torch.cat(found)

    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(NUDGE * torch.randn(parameter.shape, generator=rng).to(device))
        differences = {"teacher's outputs": _difference(lambda: taught(quick), taught(plain))}
        wanted = learnt(plain)
        found = _compiles(lambda: learnt(quick))
        differences |= {
            "student's outputs": _relative(found[0], wanted[0]),
            "student's gradients": _relative(found[1], wanted[1]),
        }
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= TOLERANCE[plain.dtype]:
        raise InputError(
            f"compile came, but torch.compile of this UNet is wrong on this machine: the {worst} differ by "
            f"{differences[worst]:.2g} of their size, allowed is {TOLERANCE[plain.dtype]:g}; leave --compile out"
        )
    return differences[worst]


def _compiles(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"compile came, but the UNet cannot be compiled ({first_line(error)}); allowed is a network that torch "
            "compiles as a whole; leave --compile out"
        ) from error


def _difference(found: Callable[[], Tensor], wanted: Tensor) -> float:
    return _relative(_compiles(found), wanted)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """|found − wanted| / |wanted|, in the 2-norm."""
    found, wanted = precise(found), precise(wanted)
    return float((found - wanted).norm() / wanted.norm())

"""What an arm costs: end to end and part by part, warmed up at the timed shape and synchronised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from fewstep.arithmetic import allocated, flops, peak_memory
from fewstep.arms import Arm
from fewstep.backbone import Backbone
from fewstep.benchmark.plan import Plan
from fewstep.pictures import Conditioning, as_bytes, draw_latents
from fewstep.records import ArmTiming, Spread
from fewstep.reporting import Bar
from fewstep.timing import WARMUP, matrix_rate, measure

PARTS = 4
"""End to end, text, one forward, decoding."""

_matrix_rate = cache(matrix_rate)
"""Of a machine that stays the same."""


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Floating point operations for one picture: reading one text, one forward of the UNet, decoding."""

    text: int
    forward: int
    decoding: int

    @classmethod
    def of(cls, plan: Plan, backbone: Backbone, arm: Arm) -> Operations:
        """Counted once in this thread; the same for all arms that draw with the same networks."""
        latents = torch.zeros(1, *backbone.latent_shape(plan.settings.resolution), device=backbone.device)
        cond, t = backbone.embed(plan.prompts[:1]), torch.full((1,), arm.timesteps[0], device=backbone.device)
        denoise = backbone.denoiser(adapter=arm.adapter)
        return cls(
            text=flops(lambda: backbone.embed(plan.prompts[:1])),
            forward=flops(lambda: denoise(latents, t, cond)),
            decoding=flops(lambda: backbone.decode(latents)),
        )


def runs_of(plan: Plan) -> int:
    """How often something is run to time an arm at one batch size."""
    return PARTS * (WARMUP + plan.settings.timing_repeats)


@torch.no_grad()
def time_arm(plan: Plan, backbone: Backbone, arm: Arm, operations: Operations, batch_size: int, bar: Bar) -> ArmTiming:
    """What a batch of ``batch_size`` pictures costs, end to end and part by part.

    Args:
        plan: of the benchmark.
        backbone: the base as the arm draws with it.
        arm: what is timed.
        operations: that its networks do for one picture.
        batch_size: pictures at once.
        bar: advanced after each of `runs_of` a batch size.
    """
    settings, prompts = plan.settings, plan.prompts
    texts = [prompts[number % len(prompts)] for number in range(batch_size)]
    ids = [(number, 0) for number in range(batch_size)]
    negative = backbone.embed([settings.negative_prompt or ""])
    resolution = settings.resolution or backbone.resolution

    def encode() -> Conditioning:
        uncond = backbone.embed([settings.negative_prompt or ""]) if arm.guided else negative
        return Conditioning(tuple(texts), backbone.embed(texts), uncond)

    def draw(arm: Arm = arm) -> Tensor:
        latents = draw_latents(backbone, arm, encode(), ids, seed=settings.seed, resolution=resolution)
        return as_bytes(backbone.decode(latents))

    # The shapes of all steps are those of the first two, and one step follows another: that warms up for any number.
    few = replace(arm, steps=min(arm.steps, 2), timesteps=arm.timesteps[:2])

    # One forward as the sampler makes it: twice the batch under guidance.
    rows = batch_size * (2 if arm.guided else 1)
    a_picture = operations.text + arm.evaluations * operations.forward + operations.decoding
    a_batch = operations.text if arm.guided else 0  # the negative prompt is read once for all
    latents = torch.zeros(rows, *backbone.latent_shape(resolution), device=backbone.device)
    cond = encode().cond[:1].expand(rows, -1, -1).contiguous()
    t = torch.full((rows,), arm.timesteps[0], device=backbone.device)
    denoise = backbone.denoiser(adapter=arm.adapter)

    def timed(work: Callable[[], object], warmup: int = WARMUP) -> Spread:
        timing = measure(
            work, repeats=settings.timing_repeats, warmup=warmup, device=backbone.device, on_run=bar.advance
        )
        return Spread(median=timing.median, iqr=timing.iqr, repeats=len(timing.seconds))

    drawn: list[Spread] = []
    for _ in range(WARMUP):  # before memory is looked at: compiling may take more of it than drawing
        draw(few)
        bar.advance()
    before = allocated(backbone.device)
    peak = peak_memory(lambda: drawn.append(timed(draw, warmup=0)), backbone.device)
    return ArmTiming(
        batch_size=batch_size,
        end_to_end=drawn[0],
        text=timed(encode),
        unet_forward=timed(lambda: denoise(latents, t, cond)),
        decode=timed(lambda: as_bytes(backbone.decode(latents[:batch_size]))),
        unet_calls=arm.steps,
        flops=batch_size * a_picture + a_batch,
        decode_flops=batch_size * operations.decoding,
        peak_memory_bytes=_without_idle(peak, before, backbone, plan.backbone),
        precision=str(backbone.dtype).removeprefix("torch."),
        matrix_rate=_matrix_rate(backbone.device, backbone.dtype),
    )


def _without_idle(peak: int | None, before: int | None, painter: Backbone, base: Backbone) -> int | None:
    """The ``peak`` while ``painter`` draws, without what only lies there: judges, and the ``base`` of a copy.

    Args:
        before: what was in use before it drew, its own networks included; None where that cannot be told, as in main
            memory, of which judges of a few million numbers are a small part.
    """
    if peak is None:
        return None
    if before is not None:
        return peak - before + _bytes(painter)
    return peak if painter is base else peak - _bytes(base)


def _bytes(backbone: Backbone) -> int:
    networks = (backbone.unet, backbone.vae, backbone.text_encoder)
    return sum(tensor.nbytes for network in networks for tensor in (*network.parameters(), *network.buffers()))

"""What a run says of itself: the plan before it begins, and how its adapter is drawn with afterwards."""

from __future__ import annotations

from collections.abc import Iterator

from fewstep import lora
from fewstep.backbone import Backbone
from fewstep.config import TrainSettings, settings_toml, spell
from fewstep.data import Slices
from fewstep.hiding import without_secrets
from fewstep.methods.kstep import KStep
from fewstep.train import engine
from fewstep.train.start import rollouts_to_keep

SOLVER_NAMES = {"ddim": "DDIM", "dpmpp": "DPM-Solver++"}


def plan(settings: TrainSettings, method: KStep, slices: Slices, backbone: Backbone) -> Iterator[str]:
    """What is going to happen to the student attached to the base, line by line; the resolved settings last."""
    rank, alpha, device = settings.lora_rank, settings.alpha, backbone.device
    interval = settings.guidance_interval
    where = "" if interval is None else f" at timesteps {interval[0]} to {interval[1]} alone"
    yield (
        f"student: LoRA of rank {rank}, alpha {alpha} (alpha / rank = {alpha / rank:g}) on "
        f"{spell(settings.lora_targets)}: {lora.trainable_parameters(backbone.unet):,} trainable parameters"
    )
    if settings.init_lora is not None:
        yield f"student begins as {settings.init_lora}"
    top = "noise" if method.sampler == "ddim" else "t"
    yield (
        f"teacher: {method.num_ddim_steps} {SOLVER_NAMES[method.solver]} steps from {top} to x0 with "
        f"guidance {method.guidance:g}{where}; t is one of {spell(method.points)}"
    )
    noised = {
        "data": "the data's pictures",
        "teacher": "the teacher's own pictures, made by a rollout more each",
        "student": "the student's guesses on its own way to t",
    }
    if settings.starts_from == "noise":
        yield f"starts: pure noise at t = {method.points[0]}, from where the teacher passes the rest"
    elif settings.starts_from == "student" and method.sampler == "ddim":
        yield f"starts: pure noise at t = {method.points[0]}, else where the student stands on its own way to t"
    else:
        yield (
            f"starts: pure noise for {settings.pure_noise_share:.0%} at t = {method.points[0]}, else, noised to t, "
            f"{noised[settings.starts_from]}"
        )
    if settings.keeps_rollouts:
        count = rollouts_to_keep(settings, slices)
        epochs = settings.max_steps * slices.global_batch / count
        each = f", {settings.pairs_per_visit} of their pairs each time" if settings.pairs_per_visit else ""
        yield f"rollouts: {count:,}, kept in {settings.rollout_dir}, gone through {epochs:.3g} times{each}"
    aim = "the teacher's x0" if method.sampler == "lcm" else "the x0 whose jump meets the teacher's path again"
    yield f"loss: {settings.loss} to {aim}, loss_weighting {settings.loss_weighting}"
    yield (
        f"training: {settings.max_steps:,} steps of {slices.global_batch} pictures ({slices.batch_size} x "
        f"{slices.accumulation} micro-batches x {slices.processes} processes) on {device}, "
        f"mixed_precision {settings.mixed_precision}"
    )
    yield (
        f"engine: UNet {'compiled' if settings.compile else 'as it is, not compiled'}, "
        f"{'channels-last' if backbone.is_channels_last else 'channels first'}, gradient checkpointing "
        f"{'on' if settings.gradient_checkpointing else 'off'}, "
        f"AdamW {'fused' if engine.fuses(settings, device) else 'plain'}"
    )
    yield "settings:"
    yield from (f"  {line}" for line in without_secrets(settings_toml(settings)).splitlines())


def stock_call(method: KStep) -> str:
    """How diffusers alone draws with the adapter, in four steps or in the most that it promises."""
    steps = 4 if 4 in method.step_counts else max(method.step_counts)
    by_itself, timesteps = f"num_inference_steps={steps}", f"timesteps={list(method.arm(steps).timesteps)}"
    asked = by_itself if method.span == 1 else timesteps
    return f"with diffusers alone: its scheduler/, and pipeline(prompt, {asked}, guidance_scale=1.0)"

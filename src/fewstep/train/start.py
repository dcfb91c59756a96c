"""What is opened and settled before the first update: base, settings, method, student, encoder, kept rollouts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from fewstep import checkpoint, lora
from fewstep.arithmetic import flops
from fewstep.arms import sampler_timesteps
from fewstep.backbone import BASES, Backbone
from fewstep.config import TrainSettings
from fewstep.data import Batches, OpenedData, Slices, StreamedPictures
from fewstep.errors import Interrupted
from fewstep.methods import METHODS
from fewstep.methods.kstep import KStep
from fewstep.opening import load_chosen, warn_of_another_base
from fewstep.reporting import Bar, Reporter
from fewstep.telemetry import Throughput
from fewstep.timesteps import promised_points
from fewstep.timing import quick_matrix_rate
from fewstep.train.encoding import Cached, Encoder, Fresh, cache_key
from fewstep.train.rollouts import RolloutStore, Teacher
from fewstep.train.unusable import Unusable
from fewstep.validation import FIGURE

LOOKED_AT = 1_000_003
"""What the seed of captions to look at is away from a run's own, with which a benchmark draws its captions."""

ORACLE_PICTURES = 16
"""Pictures an arm of the oracle where none are asked for and the base has an answer key."""


def origin_of(settings: TrainSettings, resumed: Path | None) -> checkpoint.Origin | None:
    """The base of the checkpoint to go on from, else of the adapter to begin with, as far as it is recorded.

    Raises:
        CheckpointError: there is no such adapter.
    """
    if resumed is not None:
        return checkpoint.recorded_origin(resumed)
    if settings.init_lora is None:
        return None
    return checkpoint.recorded_origin(lora.locate(settings.init_lora, flag="init_lora").folder)


def as_launched(settings: TrainSettings, warn: Callable[[str], None]) -> TrainSettings:
    """The settings with the precision that `accelerate launch` was told, where they leave it open.

    Args:
        warn: told what it was told besides and is not heeded.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # which is its default as well
    if precision in ("fp16", "bf16") and settings.mixed_precision == "auto":
        settings = settings.replace(mixed_precision=precision)
    told = {
        "mixed_precision": (precision, "no", settings.mixed_precision),
        "gradient_accumulation_steps": (
            *(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), "1"),
            str(settings.gradient_accumulation_steps),
        ),
    }
    for name, (theirs, default, ours) in told.items():
        if theirs not in (default, ours):
            warn(f"accelerate was told {name} {theirs}, and {ours} counts: pass --{name} to fewstep")
    return settings


def open_base(
    settings: TrainSettings, device: str, origin: checkpoint.Origin | None, reporter: Reporter
) -> tuple[Backbone, TrainSettings]:
    """The base, and the settings with what it makes of them; the first line that is said names it and why.

    Args:
        device: of this process.
        origin: see `origin_of`.

    Raises:
        InputError, CheckpointError: as `load_backbone`.
    """
    name, why = settings.chosen_base(origin.base_model if origin else None)
    reporter.say(f"base: {name} ({why})")
    stray = stray_data(settings, origin)
    if stray is not None:
        reporter.warn(stray)
    backbone = load_chosen(settings, device, origin, reporter)
    if settings.channels_last:
        backbone.use_channels_last()
    return backbone, resolved(settings, backbone)


def stray_data(settings: TrainSettings, origin: checkpoint.Origin | None) -> str | None:
    """What is odd about pictures that came for a base which nobody named and which draws its own."""
    came = next((name for name in ("data_dir", "dataset_name") if getattr(settings, name)), None)
    name = settings.default_base
    if came is None or name not in BASES or settings.base_model is not None or origin is not None:
        return None
    return (
        f"{came} came and no base_model: it would teach {name}, which draws data of its own and knows few words; for "
        "Stable Diffusion 1.5 pass --base_model stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def slices_of(settings: TrainSettings, processes: PartialState) -> Slices:
    """How the global batch is cut, and which part of it is this process's."""
    return Slices(
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation_steps,
        processes=processes.num_processes,
        rank=processes.process_index,
    )


def method_of(settings: TrainSettings, backbone: Backbone) -> KStep:
    """The method as the resolved settings have it.

    Raises:
        InputError: settings with which no rollout exists.
    """
    assert settings.guidance_scale is not None
    return METHODS[settings.sampler](
        schedule=backbone.schedule,
        step_counts=settings.num_inference_steps,
        num_ddim_steps=settings.teacher_steps,
        solver=settings.teacher_solver,
        guidance=settings.guidance_scale,
        pure_noise_share=settings.pure_noise_share,
        pairs_per_rollout=_most_pairs(settings, backbone),
        guidance_interval=settings.guidance_interval,
        from_noise=settings.starts_from == "noise",
        span=settings.timestep_span,
        criterion=settings.loss,
        weighting=settings.loss_weighting,
    )


def _most_pairs(settings: TrainSettings, backbone: Backbone) -> int:
    """`pairs_per_rollout`, resolved: of a path that passes all of a student's timesteps, a pair at each."""
    if settings.pairs_per_rollout is not None or settings.sampler == "lcm":
        return settings.pairs_per_rollout or 1
    grid = partial(sampler_timesteps, settings.sampler, span=settings.timestep_span)
    return len(promised_points(settings.num_inference_steps, backbone.schedule.num_train_timesteps, grid))


def student_of(
    settings: TrainSettings, backbone: Backbone, *, resumed: bool = False, warn: Callable[[str], None] | None = None
) -> list[nn.Parameter]:
    """Attach the student's adapter to the base; its parameters.

    Args:
        resumed: its weights will be a checkpoint's, whatever it began with.
        warn: told, a line each, what had to be assumed about the adapter that it begins with, and that it was made
            for another base.

    Raises:
        CheckpointError: it is to begin with the weights of an adapter that is not there, or not like it.
    """
    if settings.gradient_checkpointing:  # of forwards with gradient alone: the teacher's are as they were
        backbone.unet.enable_gradient_checkpointing()
    if settings.init_lora is not None and not resumed:
        source = lora.locate(settings.init_lora, flag="init_lora")
        if warn is not None:
            warn_of_another_base(source, backbone, warn)
        return lora.attach_trained(
            backbone.unet,
            source,
            rank=settings.lora_rank,
            alpha=settings.alpha,
            targets=settings.lora_targets,
            seed=settings.seed,
            allow_pickle=settings.allow_pickle,
            warn=warn,
        )
    return lora.attach(backbone.unet, settings.lora_rank, settings.alpha, settings.lora_targets, settings.seed)


def encoder_of(settings: TrainSettings, backbone: Backbone, opened: OpenedData) -> Encoder:
    """Where latents and embeddings come from: computed afresh, or through the cache; raises as `cache_of`."""
    if settings.cache_dir is None:
        return Fresh(backbone)
    return cache_of(settings.cache_dir, settings, backbone, opened)


def cache_of(folder: Path, settings: TrainSettings, backbone: Backbone, opened: OpenedData) -> Cached:
    """The cache for this base, this data and these resolved settings.

    Raises:
        CheckpointError: it is of something else, or damaged.
        InputError: it cannot be written to.
    """
    assert settings.resolution is not None
    key = cache_key(backbone, opened.fingerprint, settings.resolution)
    return Cached(folder, backbone, key)


def rollouts_of(settings: TrainSettings, backbone: Backbone, identity: Mapping[str, str | int]) -> RolloutStore:
    """The kept rollouts of these resolved settings.

    Args:
        identity: what they depend on besides the settings and the base.

    Raises:
        CheckpointError: the folder holds others, or is damaged.
        InputError: it cannot be written to.
    """
    return RolloutStore(settings.rollout_dir, rollout_key(settings, backbone) | dict(identity))


def idle_in_training(settings: TrainSettings, backbone: Backbone) -> list[nn.Module]:
    """The networks that updates have no use for, once rollouts that are kept are made: only looks at the student do."""
    if settings.keeps_rollouts:  # what the text encoder said of the captions is kept beside them
        return [backbone.vae, backbone.text_encoder]
    return [] if settings.starts_from == "data" else [backbone.vae]


def resolved(settings: TrainSettings, backbone: Backbone) -> TrainSettings:
    """The settings with all that was left to the base filled in: what is printed, saved and trained with."""
    oracle = 0 if backbone.abilities is None else ORACLE_PICTURES
    return settings.replace(
        base_model=backbone.name,
        guidance_scale=backbone.guidance_scale if settings.guidance_scale is None else settings.guidance_scale,
        resolution=backbone.resolution if settings.resolution is None else settings.resolution,
        lora_alpha=settings.alpha,
        start=settings.starts_from,
        num_ddim_steps=settings.teacher_steps,
        pairs_per_rollout=_most_pairs(settings, backbone),
        oracle_images=oracle if settings.oracle_images is None else settings.oracle_images,
        prediction_type=backbone.schedule.prediction_type,
        mixed_precision={torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}[backbone.dtype],
        resume_from_checkpoint=None,
    )


def rollouts_to_keep(settings: TrainSettings, slices: Slices) -> int:
    """How many rollouts the teacher makes for a run that keeps them: whole updates, rounded up."""
    if settings.teacher_rollouts is None:
        return settings.max_steps * slices.global_batch
    return -(-settings.teacher_rollouts // slices.global_batch) * slices.global_batch


OWN = {"device", "log_file", "base_model", "data_dir", "dataset_name", "cache_dir", "teacher_cache"}
"""Settings in which processes may differ: places on their own machines, whose content is compared instead."""


def to_agree_on(settings: TrainSettings, backbone: Backbone, opened: OpenedData) -> dict[str, str]:
    """What all processes of a run must have alike, for `require_agreement`."""
    asked = {name: repr(value) for name, value in settings if name not in OWN}
    return {"the base's fingerprint": backbone.fingerprint, "the data's fingerprint": opened.fingerprint, **asked}


def rollout_key(settings: TrainSettings, backbone: Backbone) -> dict[str, Any]:
    """All that the teacher's rollouts depend on besides the data and the global batch."""
    names = (
        *("seed", "guidance_scale", "num_ddim_steps", "num_inference_steps", "pure_noise_share", "pairs_per_rollout"),
        *("teacher_solver", "guidance_interval", "start", "sampler", "timestep_span"),
        *("resolution", "mixed_precision", "prediction_type"),
    )
    return {"base_fingerprint": backbone.fingerprint} | {name: getattr(settings, name) for name in names}


def keep_rollouts(
    store: RolloutStore,
    teacher: Teacher,
    batches: Batches,
    slices: Slices,
    unusable: Unusable,
    reporter: Reporter,
    should_stop: Callable[[], bool],
) -> None:
    """Make the rollouts of `batches` and put them in the store; what another run has put there since is left to it.

    Raises:
        Interrupted: stopped on request; those that are made are kept.
    """
    with reporter.progress("teacher", len(batches)) as bar:
        for batch in batches:
            first = slices.first_place(batch.update, batch.micro)
            if not store.file(first, len(batch.items)).exists():
                store.put(first, teacher(batch))
            unusable.meet(batch.replaced)
            if asked_to_stop(bar, should_stop):
                teacher.encoder.flush()
                raise Interrupted(
                    f"stopped while the teacher made its rollouts, kept in {store.folder}; go on with "
                    "--resume_from_checkpoint auto"
                )
    teacher.encoder.flush()
    unusable.share()


def asked_to_stop(bar: Bar, should_stop: Callable[[], bool], **values: float) -> bool:
    """Count a piece of work on the bar; whether to stop after it, as a signal to the bar or `should_stop` says.

    Args:
        values: shown beside the bar.
    """
    try:
        bar.advance(1, **values)
    except KeyboardInterrupt:
        return True
    return should_stop()


def validates_at(step: int, settings: TrainSettings) -> bool:
    """Whether the student is looked at after update `step`."""
    every = settings.validate_every
    return bool(every and step and (step % every == 0 or step == settings.max_steps))


def preview_file(step: int, settings: TrainSettings) -> Path:
    return settings.run_dir / "previews" / f"step-{step:06d}.png"


def left_undone(step: int, settings: TrainSettings, history: Sequence[Mapping[str, float]], measures: bool) -> bool:
    """Whether a run that goes on from `step` was stopped there before the student was looked at.

    Args:
        history: the lines of metrics.jsonl.
        measures: whether figures are taken, besides previews.
    """
    measured = any(FIGURE in row for row in history if row["step"] == step)
    return validates_at(step, settings) and not (measured if measures else preview_file(step, settings).exists())


def captions_to_show(count: int, settings: TrainSettings, backbone: Backbone, opened: OpenedData) -> list[str]:
    """Captions to look at: the base's own unseen ones, else the first that training draws.

    They are not those of a benchmark with the seed of the run: what `lora/best` was chosen by cannot also judge it.
    """
    if backbone.abilities is not None:
        return backbone.abilities.prompts(count, settings.seed + LOOKED_AT)
    if isinstance(opened.data, StreamedPictures):  # of the shard that is here: to ask for others removes what is kept
        first_shard = opened.data.first.data
        return [first_shard.captions(number)[0] for number in range(min(count, len(first_shard)))]
    few = Slices(batch_size=min(count, len(opened.data)))
    first = Batches(opened.data, few, seed=settings.seed, start=0, end=1, spared=range(2**128))
    return list(next(iter(first)).captions)


def throughput_of(settings: TrainSettings, backbone: Backbone, processes: int) -> Throughput:
    """The counter of the run's speed: operations of a forward counted, the device's rate measured, each once."""
    config, device = backbone.unet.config, backbone.device
    latents = torch.zeros(1, *backbone.latent_shape(settings.resolution), device=device)
    cond = torch.zeros(1, backbone.max_tokens, config.cross_attention_dim, device=device)
    denoise = backbone.denoiser(adapter=False)
    forward = flops(lambda: denoise(latents, torch.tensor([0], device=device), cond))
    return Throughput(processes=processes, forward=forward, rate=quick_matrix_rate(device, backbone.dtype))


def loading_workers(device: torch.device) -> int:
    """Processes that load ahead: none where the CPU does the training, else this one's share of the machine's cores.

    At most 8; the cores are those that this process may use, and the processes those of this machine alone.
    """
    if device.type == "cpu":
        return 0
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

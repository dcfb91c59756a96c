"""What is settled before the first update: processes, the checkpoint to go on from, resolved settings, what is said."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from fewstep import checkpoint, lora
from fewstep.arithmetic import flops
from fewstep.arms import sampler_timesteps
from fewstep.backbone import Backbone, load_backbone
from fewstep.backbone.threads import is_small
from fewstep.config import TrainSettings, load_toml, settings_toml, spell
from fewstep.data import Batches, OpenedData, Slices
from fewstep.errors import CheckpointError, InputError, Interrupted
from fewstep.methods import METHODS
from fewstep.methods.kstep import KStep
from fewstep.opening import versions
from fewstep.reporting import Bar, Reporter
from fewstep.telemetry import Throughput
from fewstep.timesteps import promised_points
from fewstep.timing import quick_matrix_rate
from fewstep.train import engine
from fewstep.train.encoding import Cached, Encoder, Fresh, cache_key
from fewstep.train.rollouts import RolloutStore, Teacher
from fewstep.validation import FIGURE

ORACLE_PICTURES = 16
"""Pictures an arm of the oracle where none are asked for and the base has an answer key."""

SOLVER_NAMES = {"ddim": "DDIM", "dpmpp": "DPM-Solver++"}

MAY_CHANGE = {
    *("output_dir", "run_name", "log_file", "checkpoint_every", "validate_every", "log_every", "oracle_images"),
    *("validate_images", "clip_model_id"),
    *("keep_last", "keep_every"),
    *("device", "gradient_checkpointing", "compile", "channels_last", "default_base", "revision", "allow_pickle"),
    *("teacher_cache", "cache_dir"),  # their own keys tell
    *("base_model", "data_dir", "dataset_name", "streaming", "prompts_file"),  # fingerprints tell
    *("image_column", "caption_column"),
    "max_dropped",  # likewise
    *("batch_size", "gradient_accumulation_steps"),  # the global batch tells
    "max_steps",
}
"""Settings that a resumed run may change and still be the same run. Under a cosine, max_steps is not one of them."""


def checkpoint_to_resume(settings: TrainSettings, reporter: Reporter) -> Path | None:
    """The checkpoint that the run goes on from, None for a new run; no run is ever overwritten by another one.

    Raises:
        InputError: the folder holds a run that is not resumed, or one that has gone on beyond the given checkpoint.
        CheckpointError: there is no such checkpoint, or it is broken.
    """
    run, which = settings.run_dir, settings.resume_from_checkpoint
    holds_a_run = (run / checkpoint.SETTINGS).exists() or (run / "lora").exists()
    saved = checkpoint.checkpoints(run)
    if which is None:
        if holds_a_run:
            way = "latest to go on with it" if saved else "auto to start it again, for it has no checkpoint"
            raise InputError(
                f"{str(run)!r} holds a run already; allowed is a folder without one; choose another --run_name, or "
                f"pass --resume_from_checkpoint {way}"
            )
        return None
    folder = checkpoint.resolve(run, which, warn=reporter.warn)
    if folder is None or which in ("latest", "auto"):
        return folder
    if folder.resolve().parent != (run / "lora").resolve():
        if holds_a_run:
            raise InputError(
                f"{str(run)!r} holds a run already, and {which!r} is of another one; choose a new --run_name to go on "
                "from it"
            )
    elif saved and folder.name != saved[0].name:
        raise InputError(
            f"the run in {str(run)!r} has gone on from {folder.name} to {saved[0].name}; allowed is its latest "
            "checkpoint; pass --resume_from_checkpoint latest, or a new --run_name to go on from the older one"
        )
    return folder


def state_of(run: Path) -> tuple[int | None, tuple[str, ...]]:
    """What tells that somebody has been at work in a run's folder: a start, or a checkpoint that has come."""
    try:
        started = (run / checkpoint.SETTINGS).stat().st_mtime_ns
    except OSError:
        started = None
    return started, tuple(folder.name for folder in checkpoint.checkpoints(run))


def require_unchanged(run: Path, found: object) -> None:
    """Refuse a folder that is not as it was `found` before its lock was taken: base and data take a while to open.

    Raises:
        InputError: another run has begun or gone on there meanwhile.
    """
    if state_of(run) != found:
        raise InputError(
            f"another run was at work in {str(run)!r} while this one got ready; allowed is one run a folder; go on "
            "with it by --resume_from_checkpoint auto, or choose another --run_name"
        )


def open_base(
    settings: TrainSettings, device: str, recorded: str | None, reporter: Reporter
) -> tuple[Backbone, TrainSettings]:
    """The base, and the settings with what it makes of them; the first line that is said names it and why.

    Args:
        device: of this process.
        recorded: the base that the checkpoint to go on from names.

    Raises:
        InputError, CheckpointError: as `load_backbone`.
    """
    name, why = settings.chosen_base(recorded)
    reporter.say(f"base: {name} ({why})")
    backbone = load_backbone(
        name,
        revision=settings.revision,
        device=device,
        dtype=settings.mixed_precision,
        allow_pickle=settings.allow_pickle,
        prediction_type=settings.prediction_type,
        why=why,
    )
    if settings.channels_last:
        for network in (backbone.unet, backbone.vae):
            network.to(memory_format=torch.channels_last)
    if not is_small(backbone.vae):  # one picture of Stable Diffusion's size keeps a device busy: no memory for more
        backbone.vae.enable_slicing()
    return backbone, resolved(settings, backbone)


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
        warn: told, in one line, what had to be assumed about the adapter that it begins with.

    Raises:
        CheckpointError: it is to begin with the weights of an adapter that is not there, or not like it.
    """
    if settings.gradient_checkpointing:  # of forwards with gradient alone: the teacher's are as they were
        backbone.unet.enable_gradient_checkpointing()
    if settings.init_lora is not None and not resumed:
        return lora.attach_trained(
            backbone.unet,
            lora.locate(settings.init_lora, flag="init_lora"),
            rank=settings.lora_rank,
            alpha=settings.alpha,
            targets=settings.lora_targets,
            seed=settings.seed,
            allow_pickle=settings.allow_pickle,
            warn=warn,
        )
    return lora.attach(backbone.unet, settings.lora_rank, settings.alpha, settings.lora_targets, settings.seed)


def encoder_of(settings: TrainSettings, backbone: Backbone, opened: OpenedData, *, main: bool) -> Encoder:
    """Where latents and embeddings come from: computed afresh, or through the cache; raises as `cache_of`."""
    if settings.cache_dir is None:
        return Fresh(backbone)
    return cache_of(settings.cache_dir, settings, backbone, opened, main=main)


def cache_of(folder: Path, settings: TrainSettings, backbone: Backbone, opened: OpenedData, *, main: bool) -> Cached:
    """The cache for this base, this data and these resolved settings.

    Raises:
        CheckpointError: it is of something else, or damaged.
        InputError: it cannot be written to.
    """
    assert settings.resolution is not None
    key = cache_key(backbone, opened.fingerprint, settings.resolution)
    return Cached(folder, backbone, key, writes_key=main)


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


def check_resumed(folder: Path, settings: TrainSettings, backbone: Backbone, more: Mapping[str, str | int]) -> None:
    """Refuse to go on from a checkpoint in a way that would make it another run.

    Args:
        settings: as resolved.
        more: what else has to be as it was: fingerprint of the data, global batch.

    Raises:
        CheckpointError: it was trained on another base, on other data, or in other batches.
        InputError: a setting differs, or it has more steps than are asked for.
    """
    record, name = checkpoint.verify(folder), str(folder)
    if record.base_fingerprint != backbone.fingerprint:
        raise CheckpointError(
            f"checkpoint {name!r} was trained on another base ({record.base_model}, {record.base_fingerprint}) than "
            f"{backbone.name} ({backbone.fingerprint}); pass that one as --base_model"
        )
    for key, now in more.items():
        if record.more.get(key) != now:
            raise CheckpointError(
                f"checkpoint {name!r} was trained with {key} {record.more.get(key)}, now it is {now}; go on with the "
                "same data and the same batch_size x gradient_accumulation_steps x processes, or with a new --run_name"
            )
    if record.step > settings.max_steps:
        raise InputError(
            f"checkpoint {name!r} is at step {record.step}, max_steps is {settings.max_steps}; allowed is as many or "
            "more; raise --max_steps"
        )
    before, after = load_toml(folder / checkpoint.SETTINGS), tomllib.loads(settings_toml(settings))
    free = MAY_CHANGE if settings.lr_schedule == "constant" else MAY_CHANGE - {"max_steps"}
    changed = [key for key in sorted((before.keys() | after.keys()) - free) if before.get(key) != after.get(key)]
    if changed:
        named = ", ".join(f"{key} {spell(after.get(key))} (not {spell(before.get(key))})" for key in changed)
        raise InputError(
            f"{named} came, unlike what checkpoint {name!r} was trained with; a resumed run keeps its settings; pass "
            f"--config {folder / checkpoint.SETTINGS} or a new --run_name"
        )


def warn_of_versions(folder: Path, reporter: Reporter) -> None:
    """Say which libraries a checkpoint was written with in another release: equal bytes are then not to be had."""
    before, now = dict((checkpoint.verify(folder).more.get("versions")) or {}), versions()
    changed = [f"{name} {now.get(name)} (not {before[name]})" for name in before if now.get(name) != before[name]]
    if changed:
        reporter.warn(f"{', '.join(changed)} now, unlike what {folder} was written with: sums may differ in their ends")


def plan(settings: TrainSettings, method: KStep, slices: Slices, trainable: int, device: torch.device) -> Iterator[str]:
    """What is going to happen, line by line; the resolved settings last."""
    rank, alpha = settings.lora_rank, settings.alpha
    interval = settings.guidance_interval
    where = "" if interval is None else f" at timesteps {interval[0]} to {interval[1]} alone"
    yield (
        f"student: LoRA of rank {rank}, alpha {alpha} (alpha / rank = {alpha / rank:g}) on "
        f"{spell(settings.lora_targets)}: {trainable:,} trainable parameters"
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
        f"{'channels-last' if settings.channels_last else 'channels first'}, gradient checkpointing "
        f"{'on' if settings.gradient_checkpointing else 'off'}, "
        f"AdamW {'fused' if engine.fuses(settings, device) else 'plain'}"
    )
    yield "settings:"
    yield from (f"  {line}" for line in settings_toml(settings).splitlines())


def stock_call(method: KStep) -> str:
    """How diffusers alone draws with the adapter, in four steps or in the most that it promises."""
    steps = 4 if 4 in method.step_counts else max(method.step_counts)
    by_itself, timesteps = f"num_inference_steps={steps}", f"timesteps={list(method.arm(steps).timesteps)}"
    asked = by_itself if method.span == 1 else timesteps
    return f"with diffusers alone: its scheduler/, and pipeline(prompt, {asked}, guidance_scale=1.0)"


def rollouts_to_keep(settings: TrainSettings, slices: Slices) -> int:
    """How many rollouts the teacher makes for a run that keeps them: whole updates, rounded up."""
    if settings.teacher_rollouts is None:
        return settings.max_steps * slices.global_batch
    return -(-settings.teacher_rollouts // slices.global_batch) * slices.global_batch


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
    reporter: Reporter,
    should_stop: Callable[[], bool],
) -> None:
    """Make the rollouts of `batches` and put them in the store.

    Raises:
        Interrupted: stopped on request; those that are made are kept.
    """
    with reporter.progress("teacher", len(batches)) as bar:
        for batch in batches:
            lesson = teacher(batch)
            store.put(slices.first_place(batch.update, batch.micro), lesson)
            for replaced in lesson.replaced:
                reporter.warn(str(replaced))
            if asked_to_stop(bar, should_stop):
                teacher.encoder.flush()
                raise Interrupted(
                    f"stopped while the teacher made its rollouts, kept in {store.folder}; go on with "
                    "--resume_from_checkpoint auto"
                )
    teacher.encoder.flush()


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


def drop_best(folder: Path, *, resumed: bool, warn: Callable[[str], None]) -> None:
    """Remove a `lora/best` that a run cannot go on with: of an earlier start in its folder, or not whole."""
    if not folder.exists():
        return
    if resumed:
        try:
            checkpoint.verify(folder)
            return
        except CheckpointError as error:
            warn(f"removed: {error}")
    shutil.rmtree(folder)


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
    """Captions to look at: the base's own unseen ones, else the first that training draws."""
    if backbone.abilities is not None:
        return backbone.abilities.prompts(count, settings.seed)
    few = Slices(batch_size=min(count, len(opened.data)))
    first = Batches(opened.data, few, seed=settings.seed, start=0, end=1, allowance=opened.allowance)
    return list(next(iter(first)).captions)


def throughput_of(settings: TrainSettings, backbone: Backbone, processes: int) -> Throughput:
    """The counter of the run's speed: operations of a forward counted, the device's rate measured, each once."""
    config, device = backbone.unet.config, backbone.device
    latents = torch.zeros(1, *backbone.latent_shape(settings.resolution), device=device)
    cond = torch.zeros(1, backbone.max_tokens, config.cross_attention_dim, device=device)
    denoise = backbone.denoiser(adapter=False)
    forward = flops(lambda: denoise(latents, torch.tensor([0], device=device), cond))
    return Throughput(processes=processes, forward=forward, rate=quick_matrix_rate(device, backbone.dtype))


def loading_workers(device: torch.device, processes: int) -> int:
    """Processes that load ahead: none where the CPU does the training, else one a core, at most 8."""
    return 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) // processes))

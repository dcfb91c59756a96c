"""A rehearsal: a few real steps at batch 1 and 2, and what the whole run would take by a line through the two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import floor, isfinite
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewstep.arithmetic import kept_for_backward, peak_memory, room
from fewstep.backbone import Backbone
from fewstep.backbone.threads import whole_batches
from fewstep.config import TrainSettings
from fewstep.data import Batch, Batches, OpenedData, Slices, open_data, require_there
from fewstep.ema import EMA
from fewstep.errors import InputError, is_out_of_memory
from fewstep.methods.kstep import KStep
from fewstep.processes import join_processes, own_device
from fewstep.reporting import LOG, SILENT, Reporter, in_bytes
from fewstep.timing import synchronise
from fewstep.train import engine, resuming, start
from fewstep.train.encoding import Fresh
from fewstep.train.needs import disk_of_run, free_disk
from fewstep.train.rollouts import Lesson, Teacher, turns_of
from fewstep.ui import duration

SEARCHED = 200
"""Updates among which a dear one is looked for."""

FILLED = 0.95
"""Of the free memory, how much a batch may take: allocators do not fill it to the last byte."""

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A step at one batch size, taken twice: once to warm up and count, once to measure.

    Attributes:
        teacher_seconds: of the teacher's rollouts, with all that leads to their starts.
        student_seconds: of the student's forward, backward and update.
        activations: bytes that the student's forward keeps for the backward pass, counted.
        peak: bytes at the peak of the whole step: allocated on a GPU, resident on a CPU; None where nobody tells.
    """

    teacher_seconds: float
    student_seconds: float
    activations: int
    peak: int | None


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would take.

    Attributes:
        held: bytes that are there whatever the batch, by what they are: base, adapter, gradients, optimizer.
        one, two: the steps at batch 1 and 2; no second one where it does not fit, and 1 is what was asked for.
        largest_batch: that fits into the memory there is; None where that is not known.
        seconds_per_step: an update at the settings' batch, its rollouts included where it makes its own.
        seconds: the whole run, without what loading, checkpoints and previews take.
        disk: bytes of all that it leaves, by what it is.
        free: bytes free there.
    """

    held: dict[str, int]
    one: Trial
    two: Trial | None
    largest_batch: int | None
    seconds_per_step: float
    seconds: float
    disk: dict[str, int]
    free: int


def rehearse(settings: TrainSettings, *, reporter: Reporter = LOG) -> DryRun:
    """Train for a few steps with the real base, data and settings, and throw them away. Nothing is written.

    The steps are dear ones: every sample starts from a noised picture, which has to be encoded first, and none from
    pure noise.

    Raises:
        InputError, DataError, CheckpointError: as `distill`.
    """
    processes = join_processes(settings.device)
    reporter = reporter if processes.is_main_process else SILENT
    settings = start.as_launched(settings, reporter.warn)
    require_there(settings.data_dir)
    resumed = resuming.checkpoint_to_resume(settings, reporter)
    origin = start.origin_of(settings, resumed)
    backbone, settings = start.open_base(settings, own_device(settings.device, processes), origin, reporter)
    opened = open_data(settings, backbone, streaming=settings.streaming, reporter=reporter)
    if resumed is not None:  # how many processes there will be, and so the global batch, is not known here
        resuming.check_resumed(resumed, settings, backbone, {"data_fingerprint": opened.fingerprint})
    method = start.method_of(settings, backbone)
    quick = {size: engine.quickened(backbone, settings, size) for size in (1, 2)}
    parameters = start.student_of(settings, backbone, resumed=resumed is not None, warn=reporter.warn)
    optimizer = engine.adamw_of(parameters, settings, backbone.device)
    ema = EMA(parameters, settings.ema_decay)
    slices = start.slices_of(settings, processes)

    with reporter.progress("dry run", 2) as bar, engine.compiling(settings):
        trials = []
        for size in (1, 2):
            batch = _dear_batch(size, settings, backbone, method, opened)
            try:
                if settings.compile:
                    engine.prove(quick[size], backbone, parameters, settings, size)
                trials.append(_tried(batch, settings, quick[size], method, optimizer))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size > settings.batch_size:
                    break
                raise InputError(
                    f"batch {size} does not fit into the memory of {backbone.device}; allowed is what fits, "
                    f"{'no batch as it is' if size == 1 else 'batch 1'}; pass --gradient_checkpointing, "
                    "--mixed_precision bf16 or a lower --resolution"
                ) from None
            bar.advance(1)
    one, two = trials[0], trials[1] if len(trials) > 1 else None

    moments = [value for state in optimizer.state.values() for value in state.values()]
    seconds_per_step, seconds = _durations(one, two, settings, slices)
    networks = (backbone.unet, backbone.vae, backbone.text_encoder)
    found = DryRun(
        held={
            "base": _size(weight for network in networks for weight in network.parameters()) - _size(parameters),
            "adapter": _size(parameters),
            "gradients": _size(parameters),
            "optimizer": _size([*moments, *ema.averages]),
        },
        one=one,
        two=two,
        largest_batch=_largest_batch(one, two, backbone.device),
        seconds_per_step=seconds_per_step,
        seconds=seconds,
        disk=disk_of_run(settings, backbone, opened.report, slices, sum(parameter.numel() for parameter in parameters)),
        free=free_disk(settings.run_dir),
    )
    for line in _described(found, settings, backbone.device):
        reporter.say(line)
    if sum(found.disk.values()) > found.free:
        reporter.warn(f"{settings.output_dir} has {in_bytes(found.free)} free: too little for the run")
    if found.largest_batch is not None and found.largest_batch < settings.batch_size:
        fewer = f"--batch_size {max(1, found.largest_batch)} with more --gradient_accumulation_steps"
        fix = fewer if settings.gradient_checkpointing else f"--gradient_checkpointing, or {fewer}"
        reporter.warn(f"batch_size {settings.batch_size} does not fit into the device's memory; pass {fix}")
    return found


def _dear_batch(size: int, settings: TrainSettings, backbone: Backbone, method: KStep, opened: OpenedData) -> Batch:
    """An early batch of `size` in which no sample starts from pure noise; the very first where there is none."""
    shape = backbone.latent_shape(settings.resolution)
    dear = (u for u in range(SEARCHED) if not method.draw(settings.seed, u, range(size), shape).pure.any())
    update = next(dear, 0)
    slices = Slices(batch_size=size)
    batches = Batches(
        opened.data,
        slices,
        seed=settings.seed,
        start=update,
        end=update + 1,
        allowance=opened.allowance,
        spared=frozenset() if settings.starts_from == "data" else range(2**128),
    )
    return next(iter(batches))


def _tried(
    batch: Batch, settings: TrainSettings, backbone: Backbone, method: KStep, optimizer: torch.optim.Optimizer
) -> Trial:
    """A step on `batch`, once to warm up and count, once to measure."""
    shape, student = backbone.latent_shape(settings.resolution), backbone.denoiser()
    teacher = Teacher(backbone, Fresh(backbone), method, settings.seed, shape, settings.starts_from)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def visited(lesson: Lesson) -> Lesson:
        """What an update learns from it at one visit."""
        if settings.pairs_per_visit is None:
            return lesson
        rows = len(lesson.cond)
        return replace(lesson, pairs=turns_of(lesson.pairs, range(rows), [0] * rows, settings.pairs_per_visit, seed=0))

    def learn(lesson: Lesson) -> Tensor:
        mean, _ = lesson.loss(method, student)
        mean.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return mean.detach()

    lesson = visited(teacher(batch))
    known = [*backbone.unet.parameters(), *backbone.unet.buffers()]
    with whole_batches():
        activations = kept_for_backward(lambda: lesson.loss(method, student), known)
    loss = float(learn(lesson))
    if not isfinite(loss):
        raise InputError(
            f"the loss is {loss} in {backbone.dtype}; allowed are finite numbers; pass --mixed_precision bf16 or no, "
            "or fetch the weights again"
        )
    seconds: list[float] = []

    def step() -> None:
        learn(visited(_timed(lambda: teacher(batch), seconds, backbone.device)))

    peak = peak_memory(lambda: _timed(step, seconds, backbone.device), backbone.device)
    teaching, whole = seconds
    return Trial(teacher_seconds=teaching, student_seconds=whole - teaching, activations=activations, peak=peak)


def _timed(work: Callable[[], ResultT], seconds: list[float], device: torch.device) -> ResultT:
    """Do it, and add the seconds that it took."""
    synchronise(device)
    started = time.perf_counter()
    result = work()
    synchronise(device)
    seconds.append(time.perf_counter() - started)
    return result


def _largest_batch(one: Trial, two: Trial | None, device: torch.device) -> int | None:
    """By a line through batch 1 and 2: on a GPU of the peaks, on a CPU of the activations, into what is still free."""
    if two is None:
        return 1
    space = room(device)
    if one.peak is not None and two.peak is not None and device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        first, second = one.peak - held, two.peak - held
    else:
        first, second = one.activations, two.activations
    each = second - first
    return None if space is None or each <= 0 else 1 + max(0, floor((FILLED * space - first) / each))


def _durations(one: Trial, two: Trial | None, settings: TrainSettings, slices: Slices) -> tuple[float, float]:
    """Seconds of an update at the settings' batch, and of the whole run."""
    two = one if two is None else two  # there is none for a batch of 1 alone

    def at(first: float, second: float) -> float:
        return first + max(0.0, second - first) * (slices.batch_size - 1)

    teaching = at(one.teacher_seconds, two.teacher_seconds)
    learning = at(one.student_seconds, two.student_seconds) * slices.accumulation
    if settings.keeps_rollouts:
        rollouts = start.rollouts_to_keep(settings, slices) // (slices.batch_size * slices.processes)
        return learning, rollouts * teaching + settings.max_steps * learning
    step = learning + teaching * slices.accumulation
    return step, settings.max_steps * step


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _described(found: DryRun, settings: TrainSettings, device: torch.device) -> list[str]:
    trials = [trial for trial in (found.one, found.two) if trial is not None]
    kept = ", ".join(f"{in_bytes(trial.activations)} at batch {size}" for size, trial in enumerate(trials, 1))
    peaks = [f"{in_bytes(trial.peak)} at batch {n}" for n, trial in enumerate(trials, 1) if trial.peak is not None]
    lines = [f"memory, counted: {_in_words(found.held)}; activations kept for the backward pass {kept}"]
    if peaks:
        how = "allocated" if device.type == "cuda" else "resident"
        lines.append(f"memory, peak {how}: {', '.join(peaks)}")
    if found.two is None:
        lines.append("largest batch: 1, for 2 does not fit")
    elif found.largest_batch is not None:
        by = "peaks" if device.type == "cuda" else "activations, to which comes what forwards take in passing,"
        lines.append(f"largest batch: about {found.largest_batch:,}, by the {by} at batch 1 and 2")
    kind = "learnt from kept rollouts" if settings.keeps_rollouts else "with its rollouts"
    lines += [
        f"time: {found.seconds_per_step:.3g} s an update {kind}, {duration(found.seconds)} for the whole run of "
        f"{settings.max_steps:,}, without what loading, checkpoints and previews take",
        f"disk: at most {_in_words(found.disk)}; {in_bytes(found.free)} are free",
        "dry run: nothing was written",
    ]
    return lines


def _in_words(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_bytes(count)}" for name, count in parts.items())

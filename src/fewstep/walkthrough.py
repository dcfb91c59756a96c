"""`fewstep demo`: distil the base into a LoRA, then measure that LoRA against its 50-step teacher."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.benchmark import BenchmarkResult, benchmark
from fewstep.config import BenchSettings, DemoSettings, TrainSettings, settings_toml
from fewstep.errors import InputError, Interrupted
from fewstep.files import write_text_atomic
from fewstep.reporting import LOG, Reporter
from fewstep.train import DistillResult, distill

TRAINING, BENCHMARK = "training", "benchmark"
"""The folders in outdir."""

AT_ONCE = 40
"""Pictures drawn at once for the benchmark: faster than the training's batch, and the pictures are the same."""

ORACLE = 8
"""Pictures of the perfect student."""

LOOKS = 2
"""How often training saves a checkpoint and draws previews."""


@dataclass(frozen=True, kw_only=True)
class WalkthroughResult:
    """What the two procedures returned."""

    training: DistillResult
    benchmark: BenchmarkResult


def walkthrough(
    settings: DemoSettings, *, reporter: Reporter = LOG, should_stop: Callable[[], bool] = lambda: False
) -> WalkthroughResult:
    """Distil, save, load again, draw, judge, time; a demo that was stopped goes on where it was.

    Args:
        settings: of both parts; what they do not name has the defaults of `fewstep train` and `fewstep bench`.
        reporter, should_stop: see `distill`.

    Raises:
        InputError: the folder holds a demo with other settings, or the base draws no pictures to train on.
        Interrupted: stopped on request; the same call goes on.
    """
    started = time.monotonic()
    record, text = settings.outdir / "settings.toml", settings_toml(settings)
    if record.exists() and record.read_text(encoding="utf-8") != text:
        raise InputError(
            f"{str(settings.outdir)!r} holds a demo with other settings; allowed is the same one, to go on with it; "
            "choose another --outdir, or remove the folder"
        )
    try:
        trained = distill(_training(settings), reporter=reporter, should_stop=should_stop)
    except Interrupted as stopped:
        reason = str(stopped).partition(";")[0]
        raise Interrupted(f"{reason}; go on with the same command") from None
    finally:
        if (settings.outdir / TRAINING).exists():
            write_text_atomic(record, text)
    try:
        measured = benchmark(_measuring(settings, trained.adapter), reporter=reporter)
    except Interrupted:
        raise Interrupted(
            f"stopped; what was drawn is kept in {settings.outdir}; go on with the same command"
        ) from None
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    for line in (
        f"done in {minutes}:{seconds:02d}",
        f"adapter:  {trained.adapter}",
        f"pictures: {measured.outdir / 'images'}",
        f"side by side: {measured.outdir / 'grids'}",
        f"tables:   {measured.outdir / 'results.csv'} and {measured.outdir / 'timing.csv'}",
        f"report:   {measured.outdir / 'report.html'}",
    ):
        reporter.say(line)
    return WalkthroughResult(training=trained, benchmark=measured)


def _training(settings: DemoSettings) -> TrainSettings:
    every = max(1, settings.max_steps // LOOKS)
    return TrainSettings(
        **_base(settings),
        output_dir=settings.outdir,
        run_name=TRAINING,
        sampler="ddim",
        loss_weighting="mid",
        teacher_rollouts=settings.teacher_rollouts,
        max_steps=settings.max_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_schedule="cosine",
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_targets=settings.lora_targets,
        teacher_solver="dpmpp",
        num_ddim_steps=settings.num_ddim_steps,
        num_inference_steps=settings.num_inference_steps,
        timestep_span=settings.timestep_span,
        pairs_per_visit=1,  # more paths in an update, not more of each, is what makes the error smaller
        checkpoint_every=every,
        validate_every=every,
        validate_images=0,  # the benchmark measures more of them
        oracle_images=ORACLE,
        resume_from_checkpoint="auto",
    )


def _measuring(settings: DemoSettings, adapter: Path) -> BenchSettings:
    return BenchSettings(
        **_base(settings),
        lora_path=adapter,
        outdir=settings.outdir / BENCHMARK,
        steps=settings.steps,
        num_prompts=settings.num_prompts,
        num_images=settings.num_images,
        batch_size=AT_ONCE,
        compare_baseline=True,
        baseline_steps=settings.baseline_steps,
        solver_steps=settings.solver_steps,
        solver_karras=False,  # on scenes they are the worse ones
        batch_sizes=(1,),
        resume=True,
    )


def _base(settings: DemoSettings) -> dict[str, Any]:
    """The settings that both parts share: which base, on what."""
    names = (
        *("base_model", "default_base", "revision", "prediction_type", "allow_pickle"),
        *("device", "mixed_precision", "seed"),
    )
    return {name: getattr(settings, name) for name in names}

"""Pictures in a few steps: a prompt in, PNG files out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fewstep.arms import check_arms, student_arm
from fewstep.backbone import Backbone
from fewstep.config import GenerateSettings, settings_toml
from fewstep.errors import InputError
from fewstep.files import write_text_atomic
from fewstep.opening import open_base, read_prompts, recorded_sampling, warn_of_prompts
from fewstep.pictures import draw_pictures, encode_prompts, picture_ids
from fewstep.report import (
    arm_folder,
    free_prompts,
    holds_benchmark,
    picture_path,
    refuse_another_run,
    save_picture,
)
from fewstep.reporting import LOG, Reporter
from fewstep.safety import SafetyChecker


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """The pictures, in the order arm, prompt, picture; ``blackened`` are those the safety checker objected to."""

    outdir: Path
    images: tuple[Path, ...]
    blackened: tuple[Path, ...] = ()


def generate(
    settings: GenerateSettings, *, reporter: Reporter = LOG, backbone: Backbone | None = None
) -> GenerateResult:
    """Draw ``num_images`` pictures a prompt at each step count, to ``OUTDIR/images/student-STEPS/PPP/III.png``.

    A picture is the same as in a benchmark with the same seed: it depends on its prompt's and its own number alone.

    Args:
        settings: what to draw.
        reporter: told what happens.
        backbone: a base that is loaded already; with an adapter attached, that is the one to draw with.

    Raises:
        InputError: prompts or a base that cannot be used, no adapter at all, a safety checker that is not there; a
            folder that holds a benchmark or another run.
        CheckpointError: an adapter that cannot be used or changes nothing.
    """
    refuse_another_run(settings.outdir, "drawing")
    if holds_benchmark(settings.outdir):
        raise InputError(
            f"outdir {str(settings.outdir)!r} holds a benchmark, whose pictures and settings would be "
            "replaced; allowed is any other folder; choose another --outdir"
        )
    prompts = read_prompts(settings)
    if prompts is None:
        raise InputError("no prompt came; allowed is --prompt TEXT or --prompts_file FILE; add one of the two")
    opened = open_base(settings, backbone=backbone, with_adapter=True, step_counts=settings.steps, reporter=reporter)
    backbone = opened.backbone
    settings = settings.replace(base_model=backbone.name, resolution=settings.resolution or backbone.resolution)
    count, wanted = backbone.schedule.num_train_timesteps, recorded_sampling(opened.source, reporter)
    arms = [
        student_arm(n, settings.flash_guidance, count, sampler=wanted.sampler, span=wanted.span) for n in settings.steps
    ]
    check_arms(arms, settings.negative_prompt)
    warn_of_prompts(prompts, backbone, reporter, settings.negative_prompt)
    checker = None
    if settings.safety_checker:
        checker = SafetyChecker(
            backbone.name, revision=backbone.revision, device=backbone.device, allow_pickle=settings.allow_pickle
        )

    # From here on things are written. Earlier pictures stay: the prompts are numbered on from theirs.
    images: list[Path] = []
    blackened: list[Path] = []
    with free_prompts(settings.outdir, [arm.id for arm in arms], len(prompts)) as first:
        reporter.say(settings_toml(settings).strip())
        name = f"settings-{first:03d}.toml" if first else "settings.toml"
        write_text_atomic(settings.outdir / name, settings_toml(settings))
        conditioning = encode_prompts(backbone, prompts, settings.negative_prompt)
        ids = picture_ids(len(prompts), settings.num_images)
        for arm in arms:
            folder = arm_folder(settings.outdir, arm.id)
            with reporter.progress(arm.title, len(ids)) as bar:
                for batch in draw_pictures(
                    backbone,
                    arm,
                    conditioning,
                    ids,
                    seed=settings.seed,
                    batch_size=settings.batch_size,
                    resolution=settings.resolution,
                ):
                    objections = checker.objections(batch.pixels) if checker else [False] * len(batch.ids)
                    for (prompt, picture), pixels, objected in zip(batch.ids, batch.pixels, objections, strict=True):
                        shown = torch.zeros_like(pixels) if objected else pixels
                        path = picture_path(folder, first + prompt, picture)
                        images.append(save_picture(path, shown.permute(1, 2, 0).numpy()))
                        if objected:
                            blackened.append(path)
                    bar.advance(len(batch.ids))
    if blackened:
        reporter.warn(f"the safety checker objected to {len(blackened)} of {len(images)} pictures: they are black")
    where = f", the first in {images[0].parent.relative_to(settings.outdir)}" if first else ""
    reporter.say(f"{len(images)} picture{'s' if len(images) != 1 else ''} in {settings.outdir / 'images'}{where}")
    return GenerateResult(outdir=settings.outdir, images=tuple(images), blackened=tuple(blackened))

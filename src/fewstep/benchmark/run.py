"""The benchmark from the first line to the last: open, draw, judge, time, compare, write."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep import lora
from fewstep.arms import Arm, check_arms, solver_arm, student_arm, teacher_arm
from fewstep.backbone import Backbone
from fewstep.benchmark.adapters import Adapters, controls
from fewstep.benchmark.cells import ArmCells, Cells, make_room
from fewstep.benchmark.cost import time_arm
from fewstep.benchmark.distribution import measure_distributions
from fewstep.benchmark.drawing import draw, judges_of, replacing
from fewstep.benchmark.summary import sum_up
from fewstep.config import BenchSettings, settings_toml
from fewstep.errors import InputError, Interrupted
from fewstep.files import write_text_atomic
from fewstep.metrics.alignment import CLIPAlignment
from fewstep.opening import open_base, read_prompts, warn_of_prompts
from fewstep.pictures import Evaluation, encode_prompts
from fewstep.processes import join_processes, own_device
from fewstep.records import ArmSummary, ArmTiming, BenchmarkRecord, Row
from fewstep.report import (
    RECORD_FILE,
    RESULT_FILES,
    arm_folder,
    markdown,
    page,
    results_csv,
    save_grids,
    timing_csv,
    verdict,
)
from fewstep.reporting import SILENT, Bar, Reporter

REFERENCES = 5
"""Reference pictures a prompt, where none are asked for and the base draws its own."""

CELLS = "cells"
"""The folder in outdir with what was found so far."""

NO_ALIGNMENT = "none"
"""What `--clip_model_id` says where alignment is to be left out."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """What was found, and where it lies; of several processes the first alone has the rows."""

    outdir: Path
    record: BenchmarkRecord
    rows: tuple[Row, ...]
    folders: Mapping[str, Path]

    @property
    def arms(self) -> tuple[ArmSummary, ...]:
        return tuple(self.record.summary.values())

    @property
    def verdict(self) -> list[str]:
        """The findings in sentences."""
        return verdict(self.record)


def benchmark(
    settings: BenchSettings,
    *,
    reporter: Reporter = SILENT,
    backbone: Backbone | None = None,
    arms: Sequence[Arm] | None = None,
) -> BenchmarkResult:
    """Draw, judge, time, and write the files of contracts.md to ``settings.outdir``.

    Args:
        settings: what to compare.
        reporter: told what happens.
        backbone: a base that is loaded already; with an adapter attached, that is the student.
        arms: other arms than the settings describe.

    Raises:
        InputError: prompts, arms or a base that cannot be used; no adapter to measure.
        CheckpointError: an adapter that attaches nothing or changes nothing; CLIP weights that are not at hand.
        Interrupted: stopped on request; what was drawn is kept.
    """
    processes = join_processes(settings.device)
    main = processes.is_main_process
    reporter = _Listening(reporter if main else SILENT)
    prompts = read_prompts(settings)
    named = settings.lora_path is not None or settings.lora_id is not None
    # With a file of adapters the base's own one is not taken unasked.
    wants_adapter = (named or settings.adapters_file is None) if arms is None else any(arm.adapter for arm in arms)
    opened = open_base(
        settings.replace(device=own_device(settings.device, processes)),
        backbone=backbone,
        with_adapter=wants_adapter,
        step_counts=settings.steps,
        reporter=reporter,
    )
    backbone = opened.backbone
    if prompts is None:
        prompts = _own_prompts(settings, backbone)
    settings = _resolved(settings, backbone)
    adapters = Adapters(settings, backbone, opened.source, reporter)
    arms = tuple(arms or _arms(settings, backbone, adapters, with_student=wants_adapter))
    check_arms(arms, settings.negative_prompt)
    warn_of_prompts(prompts, backbone, reporter)
    adapters.warn_of_timesteps(arms, reporter)
    alignment = _alignment(settings, backbone, reporter)
    if settings.timing_repeats < 5:
        reporter.warn(f"timing_repeats {settings.timing_repeats} came; below 5, medians and spreads mean little")

    # From here on things are written.
    outdir = settings.outdir
    folders = {
        arm.id: arm_folder((settings.baseline_outdir if arm.is_baseline else None) or outdir, arm.id) for arm in arms
    }
    if main:
        make_room(outdir / CELLS, resume=settings.resume, finished=(outdir / RESULT_FILES[0]).exists())
    processes.wait_for_everyone()
    cells = Cells(outdir / CELLS, _key(settings, backbone, prompts, alignment))
    kept: dict[str, ArmCells] = {}
    for arm in arms:
        with adapters.on(arm):
            kept[arm.id] = cells.of(arm, lora.digest(backbone.unet) if arm.adapter else None)
    if main:
        _clear(outdir, () if settings.resume else folders.values(), reporter)
        reporter.say(settings_toml(settings).strip())
        write_text_atomic(outdir / "settings.toml", settings_toml(settings))
    processes.wait_for_everyone()

    conditioning = encode_prompts(backbone, prompts, settings.negative_prompt)
    judges = judges_of(backbone, conditioning, alignment, with_features=bool(settings.frechet_images))
    timings: dict[str, tuple[ArmTiming, ...]] = {}
    sizes = sorted(settings.batch_sizes or {1, settings.batch_size})

    def drawn(arm: Arm, share: tuple[int, int]) -> Evaluation:
        with adapters.on(arm):
            return draw(
                backbone, arm, conditioning, settings, judges, folders[arm.id], kept[arm.id], share, reporter
            )  # fmt: skip

    try:
        # All processes draw, batch by batch; the first one does the rest alone, when nothing else runs any more.
        evaluations = {arm.id: drawn(arm, (processes.process_index, processes.num_processes)) for arm in arms}
        processes.wait_for_everyone()
        if not main:
            processes.wait_for_everyone()
            record = BenchmarkRecord.from_json((outdir / RECORD_FILE).read_text(encoding="utf-8"))
            return BenchmarkResult(outdir=outdir, record=record, rows=(), folders=folders)
        if processes.num_processes > 1:
            evaluations = {arm.id: drawn(arm, (0, 1)) for arm in arms}  # the others' batches are read
        for arm in arms:
            known = kept[arm.id].timings(sizes)
            with adapters.on(arm), reporter.progress(f"timing {arm.id}", len(sizes)) as bar:
                timings[arm.id] = known or tuple(
                    time_arm(backbone, arm, prompts, size, settings, bar) for size in sizes
                )
            kept[arm.id].put_timings(timings[arm.id])
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; what was drawn is kept in {outdir}; go on with --resume") from None

    distributions = measure_distributions(settings, backbone, alignment, prompts, evaluations, reporter)
    record, rows = sum_up(
        settings,
        backbone,
        opened.adapter,
        {one.entry.id: one.facts for one in adapters.further},
        alignment,
        prompts,
        arms,
        evaluations,
        timings,
        distributions,
        reporter.warnings,
    )
    with replacing(outdir / "grids") as grids, reporter.progress("grids", len(prompts)) as bar:
        save_grids(grids, folders, prompts, settings.num_images, bar.advance)
    texts = (
        results_csv(rows),
        timing_csv(record.summary.values(), record.machine, record.matrix_rate),
        record.to_json(),
        page(record, folders),
    )
    for name, text in zip(RESULT_FILES, texts, strict=True):
        write_text_atomic(outdir / name, text)
    for line in [markdown(list(record.summary.values())), *verdict(record)]:
        reporter.say(line)
    reporter.say(f"pictures and grids in {outdir}; the report is {outdir / 'report.html'}")
    processes.wait_for_everyone()
    return BenchmarkResult(outdir=outdir, record=record, rows=tuple(rows), folders=folders)


# -------------------------------------------------------------------------------------------------- before the drawing


class _Listening:
    """A reporter that keeps the warnings, so that the report repeats them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        self._reporter.say(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self._reporter.warn(text)

    def progress(self, name: str, total: int) -> AbstractContextManager[Bar]:
        return self._reporter.progress(name, total)


def _own_prompts(settings: BenchSettings, backbone: Backbone) -> list[str]:
    if backbone.abilities is None:
        raise InputError(
            f"no prompt came and the base {backbone.name} brings none; allowed is --prompt TEXT or --prompts_file FILE "
            "with a prompt a line; add one of the two"
        )
    return backbone.abilities.prompts(settings.num_prompts, settings.seed)


def _resolved(settings: BenchSettings, backbone: Backbone) -> BenchSettings:
    """What was left open is the base's; what comes out can be passed back to --config."""
    own_pictures = 0 if backbone.abilities is None else REFERENCES
    return settings.replace(
        base_model=backbone.name,
        resolution=settings.resolution or backbone.resolution,
        frechet_images=own_pictures if settings.frechet_images is None else settings.frechet_images,
        baseline_guidance=backbone.guidance_scale if settings.baseline_guidance is None else settings.baseline_guidance,
    )


def _arms(settings: BenchSettings, backbone: Backbone, adapters: Adapters, *, with_student: bool) -> list[Arm]:
    count = backbone.schedule.num_train_timesteps
    students = [student_arm(steps, settings.flash_guidance, count) for steps in settings.steps if with_student]
    students += adapters.arms()
    if not settings.compare_baseline:
        return students
    guidance = backbone.guidance_scale if settings.baseline_guidance is None else settings.baseline_guidance
    alpha_bar = backbone.schedule.alphas_cumprod.tolist()
    solvers = [
        solver_arm(steps, guidance, alpha_bar, karras=karras)
        for karras in (False, True)
        for steps in settings.solver_steps
        if steps
    ]
    return [teacher_arm(settings.baseline_steps, guidance, count), *solvers, *students, *controls(students, count)]


def _alignment(settings: BenchSettings, backbone: Backbone, reporter: Reporter) -> CLIPAlignment | None:
    """The alignment model: the base's own, unless another one was asked for; None where it is to be left out."""
    asked = settings.clip_model_id
    if asked == NO_ALIGNMENT:
        reporter.say("alignment is left out, as asked")
        return None
    own = backbone.abilities is not None and asked == BenchSettings.model_fields["clip_model_id"].default
    model = backbone.abilities.alignment_model() if own and backbone.abilities else asked
    return CLIPAlignment(model, device=backbone.device, allow_pickle=settings.allow_pickle)


def _key(
    settings: BenchSettings, backbone: Backbone, prompts: Sequence[str], alignment: CLIPAlignment | None
) -> dict[str, Any]:
    """Everything that pictures and judgements of all arms depend on."""
    names = ("seed", "num_images", "batch_size", "resolution", "negative_prompt")
    return {name: getattr(settings, name) for name in names} | {
        "base": backbone.fingerprint,
        "precision": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        "alignment_model": alignment.name if alignment else None,
        "features": bool(settings.frechet_images),
        "prompts": list(prompts),
    }


def _clear(outdir: Path, folders: Iterable[Path], reporter: Reporter) -> None:
    """Take an earlier run's tables away, and its pictures from `folders`: beside this run's they would be wrong."""
    stale = [outdir / name for name in RESULT_FILES if (outdir / name).exists()]
    if stale and folders:
        reporter.warn(f"{outdir} holds an earlier benchmark: its tables and pictures are replaced")
    for path in stale:
        path.unlink()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
